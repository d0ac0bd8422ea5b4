"""The table of settings: runs that differ in nothing but their seed are one row."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from lora_one.harness.console import make_console
from lora_one.reports.arms import higher_is_better
from lora_one.reports.comparison import compare
from lora_one.reports.groups import Group, group_runs, seed_key, varied_settings
from lora_one.reports.records import Run
from lora_one.reports.statistics import mean, mean_of, paired_difference, sd

BEST, TIE = "best", "tie"
TIE_MARK = "≈"


@dataclass(frozen=True)
class Results:
    """Column names and rows of text, and what was left out of them.

    Attributes:
        columns: Their names.
        rows: Cells as text.
        notes: Runs that are in no row, and why.
        marks: (row, column) -> ``best``, or ``tie`` where it cannot be told from the best.
    """

    columns: list[str]
    rows: list[list[str]]
    notes: list[str]
    marks: dict[tuple[int, int], str] = field(default_factory=dict)


def summarise(runs: Sequence[Run]) -> Results:
    """Average finished runs over their seeds; list the others without averaging them.

    Accuracy and losses are mean +- sample standard deviation over the seeds; seconds are means
    (a start from the cache counts with what it cost to compute); memory is the largest of all
    phases and seeds. Runs that repeat another count once, see ``group_runs``.
    """
    groups, repeats = group_runs(runs)
    varied = varied_settings(groups)
    # The validation loss of a trial has a column of its own.
    metrics = sorted({group.primary_metric for group in groups} - {"validation_loss"})
    columns = [
        "method",
        "optimiser",
        "lr",
        *varied,
        "seeds",
        *metrics,
        "test rows",
        "validation loss",
        "init s",
        "train s",
        "memory GB",
    ]
    rows = [_row(group, varied, metrics) for group in groups]
    return Results(columns, rows, excluded(runs, repeats), _marks(groups, columns))


def excluded(runs: Sequence[Run], repeats: Sequence[tuple[Run, Run]]) -> list[str]:
    """Say of every run that is in no average why."""
    notes = [
        f"{run.status}: {run.folder.name}{reason(run)}" for run in runs if run.status != "finished"
    ]
    return notes + [
        f"{_repeated(first, again)} of {first.folder.name} once more: {again.folder.name}"
        for first, again in repeats
    ]


def _repeated(first: Run, again: Run) -> str:
    same_seeds = seed_key(first.settings) == seed_key(again.settings)
    return "settings and seeds" if same_seeds else "the replies"


def _row(group: Group, varied: list[str], metrics: list[str]) -> list[str]:
    rate = group.learning_rate
    return [
        group.method,
        group.optimiser,
        "-" if rate is None else f"{rate:g}",
        *(str(group.settings.get(key)) for key in varied),
        str(len(group.runs)),
        *(mean_sd(group.values(name)) for name in metrics),
        "-" if group.test_rows is None else str(group.test_rows),
        mean_sd(group.validation_losses),
        f"{mean(group.init_seconds):.1f}",
        f"{mean(group.train_seconds):.1f}",
        f"{group.peak_memory / 1e9:.2f}",
    ]


def _marks(groups: list[Group], columns: list[str]) -> dict[tuple[int, int], str]:
    """Find the best row among those that can be compared, and the rows that tie with it."""
    place = {id(group): index for index, group in enumerate(groups)}
    marks = {}
    for block in compare(groups):
        metric = block.metric
        column = columns.index(metric.replace("validation_loss", "validation loss"))
        scored = [group for group in block.groups if mean_of(group.values(metric)) is not None]
        if len(scored) < 2:
            continue
        pick = max if higher_is_better(metric) else min
        best = pick(scored, key=lambda group, metric=metric: mean_of(group.values(metric)))
        marks[place[id(best)], column] = BEST
        for group in scored:
            difference = paired_difference(group.by_seed(metric), best.by_seed(metric))
            if group is not best and difference.is_real is False:
                marks[place[id(group)], column] = TIE
    return marks


def mean_sd(values: Sequence[float | None]) -> str:
    """Return ``mean ± sd`` as text; ``-`` where a value is missing."""
    if mean_of(values) is None:
        return "-"
    spread = sd(values)
    return f"{mean(values):.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def reason(run: Run) -> str:
    """Return why a run is not finished, in brackets, or nothing."""
    if run.problem is not None:
        return f" ({run.problem})"
    stopped, error = run.record.get("preempted"), run.record.get("error")
    if run.status == "preempted" and isinstance(stopped, dict):
        return f" ({_first_line(stopped.get('reason'))})"
    if not isinstance(error, dict):
        return ""
    kind, first_line = str(error.get("type", "error")), _first_line(error.get("message"))
    return f" ({kind}: {first_line})" if first_line else f" ({kind})"


def _first_line(text: object) -> str:
    return (str(text or "").splitlines() or [""])[0]


def render(results: Results) -> None:
    """Print the table of settings to the terminal."""
    _render(results, note="not in the table: ")


def render_comparison(results: Results) -> None:
    """Print the table of a comparison to the terminal."""
    _render(results, note="")


def _render(results: Results, note: str) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(results.columns):
        table.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
    for index, row in enumerate(results.rows):
        cells = [_marked(cell, results.marks.get((index, at))) for at, cell in enumerate(row)]
        table.add_row(*cells)
    # A number that is cut off is worse than a line that wraps: the table takes the width it needs.
    needed = Measurement.get(Console(width=10_000), Console().options.update(width=10_000), table)
    console = Console(width=max(make_console().width, needed.maximum))
    console.print(table)
    if TIE in results.marks.values():
        print(f"  {TIE_MARK} cannot be told from the best by the seeds that both have")
    for text in results.notes:
        console.print(f"  {note}{text}", highlight=False, markup=False, soft_wrap=True)


def _marked(cell: str, mark: str | None) -> Text:
    if mark == BEST:
        return Text(cell, style="bold")
    return Text(f"{TIE_MARK} {cell}" if mark == TIE else cell)


def to_markdown(results: Results) -> str:
    """Return the table as Markdown, the best in bold."""
    rule = ["---", "---", *("---:" for _ in results.columns[2:])]
    rows = [
        [_markdown(cell, results.marks.get((index, at))) for at, cell in enumerate(row)]
        for index, row in enumerate(results.rows)
    ]
    lines = [f"| {' | '.join(row)} |" for row in (results.columns, rule, *rows)]
    if TIE in results.marks.values():
        lines += ["", f"{TIE_MARK} cannot be told from the best by the seeds that both have."]
    lines += ["", *(f"- not in the table: {plain_markdown(note)}" for note in results.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _markdown(cell: str, mark: str | None) -> str:
    cell = plain_markdown(cell)
    if mark == BEST:
        return f"**{cell}**"
    return f"{TIE_MARK} {cell}" if mark == TIE else cell


def plain_markdown(text: str) -> str:
    """Return text from a run folder so that Markdown shows it and does not obey it.

    A pipe would end a cell, a newline the table, and ``<`` start HTML.
    """
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")


def to_csv(results: Results) -> str:
    """Return the table as CSV."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([results.columns, *results.rows])
    return buffer.getvalue()

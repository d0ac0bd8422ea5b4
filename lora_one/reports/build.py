"""Everything that is written from a folder of runs: tables, plots, one page."""

import csv
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_one.reports.comparison import Block, compare
from lora_one.reports.details import LEVELS, Detail, describe_run, read_init
from lora_one.reports.figure import Evidence, slug
from lora_one.reports.figures import make_figures, shown_runs
from lora_one.reports.groups import Group, diverged_runs, group_runs
from lora_one.reports.latex import to_latex
from lora_one.reports.page import pack, render_page
from lora_one.reports.page_data import chosen_words, common_settings, overview, run_table
from lora_one.reports.paper import beside, require_table
from lora_one.reports.plots import write_plots
from lora_one.reports.published import load, numbers
from lora_one.reports.records import Run
from lora_one.reports.statistics import RULE, mean, sd
from lora_one.reports.table import (
    BEST,
    TIE,
    Results,
    mean_sd,
    plain_markdown,
    summarise,
    to_csv,
    to_markdown,
)
from lora_one.reports.traces import Trace, read_trace

# What a mail server takes and a phone opens. The page shows less of each run until it fits.
PAGE_BYTES = 9_500_000
GROUP_COLUMNS = (
    "method",
    "optimiser",
    "lr",
    "metric",
    "n",
    "mean",
    "sd",
    "validation loss mean",
    "validation loss sd",
    "first run",
)


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        folder: Where.
        files: All of it.
        page_bytes: Size of ``report.html``.
        seconds: How long it took.
        results: The table of settings.
    """

    folder: Path
    files: tuple[Path, ...]
    page_bytes: int
    seconds: float
    results: Results


def build_report(
    runs: Sequence[Run], folder: Path, *, title: str = "Runs", paper: str | None = None
) -> Report:
    """Write the report of some runs.

    Args:
        runs: All that were found, finished or not.
        folder: Where it goes; it is made if needed.
        title: Of the page.
        paper: A published table to stand beside, such as ``lora_one/table2``.

    Raises:
        InputError: there is no such published table.
        OSError: the folder cannot be written.
    """
    began = time.perf_counter()
    published = load()
    if paper is not None:
        require_table(published, paper)
    folder.mkdir(parents=True, exist_ok=True)
    groups, _ = group_runs(runs)
    blocks = compare(groups, diverged_runs(runs))
    results = summarise(runs)
    common = common_settings(runs)
    detail, packed, evidence = _read_runs(runs, blocks, common)
    figures = [make_figures(block, evidence) for block in blocks]

    tables = {"settings": results, "comparison": comparison_table(blocks)}
    if paper is not None:
        tables["paper"] = beside(published, paper, groups)
    texts = {"runs.csv": _runs_csv(runs), "groups.csv": _groups_csv(groups)}
    for name, table in tables.items():
        texts[f"{name}.csv"] = to_csv(table)
        texts[f"{name}.md"] = to_markdown(table) if table is results else _with_notes(table)
        texts[f"{name}.tex"] = to_latex(table, caption=f"{title}: {name}", label=f"tab:{name}")
    plots: list[Path] = []
    for block, drawn in zip(blocks, figures, strict=True):
        prefix = f"{slug(block.title)}-" if len(blocks) > 1 else ""
        plots += write_plots(drawn, folder, prefix)
    texts["report.md"] = _markdown(title, blocks, tables, plots)

    data = overview(runs, blocks, figures, results, numbers(published), common)
    data |= {"title": title, "subtitle": _subtitle(runs, detail)}
    if paper is not None:
        data["paper"] = _paper_data(tables["paper"])
    page = render_page(title, data, packed)
    texts["report.html"] = page
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    files = [*(folder / name for name in sorted(texts)), *plots]
    size = len(page.encode("utf-8"))
    return Report(folder, tuple(files), size, time.perf_counter() - began, results)


def _read_runs(
    runs: Sequence[Run], blocks: Sequence[Block], common: dict[str, Any]
) -> tuple[Detail, list[str], Evidence]:
    """Read each run once, and again with less detail if the page would become too large."""
    wanted = shown_runs(blocks)
    for detail in LEVELS:
        packed: list[str] = []
        traces: dict[str, Trace] = {}
        inits: dict[str, dict[str, Any]] = {}
        for done, run in enumerate(runs, start=1):
            metric = run.record.get("primary_metric")
            trace = read_trace(run.folder, metric if isinstance(metric, str) else "")
            init = read_init(run.folder)
            packed.append(pack(describe_run(run, trace, init, common, detail)))
            if run.folder.name in wanted:
                traces[run.folder.name], inits[run.folder.name] = trace, init
            # A few runs tell how large all will be.
            expected = sum(map(len, packed)) / done * len(runs)
            if detail != LEVELS[-1] and done >= min(20, len(runs)) and expected > PAGE_BYTES:
                break
        else:
            break
    return detail, packed, Evidence(traces, inits)


def comparison_table(blocks: Sequence[Block]) -> Results:
    """One row per method and optimiser at its chosen setting, with its difference to the best."""
    columns = [
        "method, optimiser",
        "chosen",
        "settings tried",
        "seeds",
        "result",
        "validation loss",
        "difference",
        "95 % interval",
        "verdict",
        "init s",
        "train s",
        "all trials s",
        "memory GB",
    ]
    rows, marks, notes = [], {}, []
    for block in blocks:
        # Several blocks are told apart by their title, which a single one does not need.
        suffix = f" ({block.title})" if len(blocks) > 1 else ""
        for row in block.rows:
            if row.is_best or row.is_tie:
                marks[len(rows), 4] = BEST if row.is_best else TIE
            chosen, difference = row.arm.chosen, row.difference
            interval = None if difference is None else difference.interval
            rows.append(
                [
                    row.arm.name + suffix,
                    chosen_words(row.arm),
                    str(row.arm.budget),
                    str(len(chosen.runs)),
                    mean_sd(chosen.values(block.metric)),
                    mean_sd(chosen.validation_losses),
                    "-"
                    if difference is None or difference.mean is None
                    else f"{difference.mean:+.4f}",
                    "-" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}",
                    row.verdict,
                    f"{mean(chosen.init_seconds):.1f}",
                    f"{mean(chosen.train_seconds):.1f}",
                    f"{row.arm.seconds:.1f}",
                    f"{chosen.peak_memory / 1e9:.2f}",
                ]
            )
        notes += [f"{warning}{suffix}" for warning in block.warnings]
    return Results(columns, rows, notes, marks)


def _markdown(
    title: str, blocks: Sequence[Block], tables: dict[str, Results], plots: Sequence[Path]
) -> str:
    metrics = ", ".join(dict.fromkeys(block.title for block in blocks)) or "no finished run"
    comparison, settings = tables["comparison"], tables["settings"]
    lines = [
        f"# {plain_markdown(title)}",
        "",
        plain_markdown(metrics),
        "",
        "## Comparison",
        "",
        "Each method and optimiser at the setting with the lowest mean validation loss of those "
        f"tried. {RULE}",
        "",
        _with_notes(comparison),
        "## Settings",
        "",
        "Mean ± standard deviation (n - 1) over seeds; the best in bold.",
        "",
        to_markdown(settings),
    ]
    if "paper" in tables:
        lines += ["## Beside the published table", "", _with_notes(tables["paper"])]
    shown = [file for file in plots if file.suffix == ".svg"]
    if shown:
        lines += ["## Plots", "", *(f"![{file.stem}]({file.name})\n" for file in shown)]
    return "\n".join(lines).rstrip() + "\n"


def _with_notes(table: Results) -> str:
    """Return a table as Markdown, its notes as a list: they are about the rows that are there."""
    bare = Results(table.columns, table.rows, [], table.marks)
    notes = "".join(f"- {plain_markdown(note)}\n" for note in table.notes)
    return f"{to_markdown(bare)}\n{notes}".rstrip() + "\n"


def _runs_csv(runs: Sequence[Run]) -> str:
    """One line per run folder, numbers in full."""
    table = run_table(runs)
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([table["columns"], *table["rows"]])
    return buffer.getvalue()


def _groups_csv(groups: Sequence[Group]) -> str:
    """One line per setting, mean, deviation and number in columns of their own."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(GROUP_COLUMNS)
    for group in groups:
        values = [value for value in group.values(group.primary_metric) if value is not None]
        losses = [value for value in group.validation_losses if value is not None]
        writer.writerow(
            [
                group.method,
                group.optimiser,
                group.learning_rate,
                group.primary_metric,
                len(values),
                mean(values) if values else None,
                sd(values),
                mean(losses) if losses else None,
                sd(losses),
                group.runs[0].folder.name,
            ]
        )
    return buffer.getvalue()


def _subtitle(runs: Sequence[Run], detail: Detail) -> str:
    ended = [run.record.get("ended") for run in runs]
    last = max((str(end) for end in ended if end), default=None)
    until = f", the last one ended {last[:10]}" if last else ""
    less = "" if detail == LEVELS[0] else f"; at most {detail.buckets} points per curve of a run"
    return f"{len(runs):,} run folders{until}{less}"


def _paper_data(table: Results) -> dict[str, Any]:
    title, *notes = table.notes
    return {"title": title, "columns": table.columns, "rows": table.rows, "notes": notes}

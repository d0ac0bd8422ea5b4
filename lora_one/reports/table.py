"""The comparison table: runs that differ in nothing but their seed are one row."""

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from lora_one.harness.console import make_console
from lora_one.reports.records import Run

SEEDS = ("seed", "dataset.seed", "init.seed", "model.seed", "evaluation.seed")

# Settings that the fixed columns already show, or that follow from the choice of a method.
SHOWN = {
    "train",
    "model.learning_rate",
    "optimizer.name",
    "init.direction",
    "peft.use_peft",
    "peft.dora",
    "peft.adalora",
}
FOLLOWS_METHOD = ("init.scale", "init.stable_gamma", "init.bsz", "init.iters", "init.max_length")
FOLLOWS_OPTIMISER = ("optimizer.damping", "optimizer.lr_ratio")


@dataclass(frozen=True)
class Results:
    """Column names and rows of text, and what was left out of them."""

    columns: list[str]
    rows: list[list[str]]
    notes: list[str]


def summarise(runs: Sequence[Run]) -> Results:
    """Average finished runs over their seeds; list the others without averaging them.

    Accuracy and losses are mean +- sample standard deviation over the seeds; seconds are means
    (a start from the cache counts with what it cost to compute); memory is the largest of all
    phases and seeds. Of untrained runs that gave the same replies under other seeds one counts:
    nothing in them was random, so that they would feign a standard deviation of 0.
    """
    finished = [run for run in runs if run.status == "finished"]
    groups: dict[str, list[Run]] = {}
    for run in finished:
        settings = {key: value for key, value in run.settings.items() if key not in SEEDS}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    repeats = [pair for runs in groups.values() for pair in _take_repeats(runs)]
    varied = _varied(list(groups.values()))
    metrics = sorted({run.record["primary_metric"] for run in finished})
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
    rows = [_row(group, varied, metrics) for group in groups.values()]
    notes = [
        f"{run.status}: {run.folder.name}{_reason(run)}" for run in runs if run not in finished
    ]
    notes += [
        f"the replies of {first.folder.name} once more: {again.folder.name}"
        for first, again in repeats
    ]
    return Results(columns, rows, notes)


def _take_repeats(group: list[Run]) -> list[tuple[Run, Run]]:
    """Take out of a group the untrained runs that repeat another; return both of each."""
    seen: dict[str, Run] = {}
    repeats = []
    for run in list(group):
        replies = (run.record.get("evaluation") or {}).get("replies_sha256")
        if _is_trained(run.settings) or replies is None:
            continue
        # A start that differs shows in the loss before it shows in a greedy reply.
        outcome = json.dumps([replies, run.record["losses"]["validation"]])
        first = seen.setdefault(outcome, run)
        if first is not run:
            group.remove(run)
            repeats.append((first, run))
    return repeats


def _varied(groups: list[list[Run]]) -> list[str]:
    """Settings in which runs of the same method and optimiser differ: they need a column."""
    varied: set[str] = set()
    keys = sorted({key for group in groups for key in group[0].settings})
    for key in keys:
        if key in SEEDS or key in SHOWN:
            continue
        same_method: dict[tuple[str, ...], set[str]] = {}
        for group in groups:
            settings, record = group[0].settings, group[0].record
            kin: tuple[str, ...] = ()
            if key in FOLLOWS_METHOD:
                kin = (record["method"],)
            elif key in FOLLOWS_OPTIMISER:
                kin = (settings["optimizer.name"],)
            elif key.startswith("dataset.") and key != "dataset.name":
                # Each benchmark has options of its own.
                kin = (settings.get("dataset.name"),)
            same_method.setdefault(kin, set()).add(json.dumps(settings.get(key)))
        if any(len(values) > 1 for values in same_method.values()):
            varied.add(key)
    return sorted(varied)


def _row(group: list[Run], varied: list[str], metrics: list[str]) -> list[str]:
    settings, records = group[0].settings, [run.record for run in group]
    phases = [record["phases"] for record in records]
    peak = max(phase["peak_memory_bytes"] for run in phases for phase in run.values())
    return [
        records[0]["method"],
        *_training(settings),
        *(str(settings.get(key)) for key in varied),
        str(len(group)),
        *(_mean_sd([r["metrics"].get(name) for r in records]) for name in metrics),
        str(records[0]["metrics"]["n"]),
        _mean_sd([record["losses"]["validation"] for record in records]),
        _mean([_init_seconds(record) for record in records]),
        _mean([run["train"]["seconds"] for run in phases]),
        f"{peak / 1e9:.2f}",
    ]


def _training(settings: dict[str, Any]) -> list[str]:
    """Optimiser and learning rate, or that there was no training: the start itself is the row."""
    if not _is_trained(settings):
        return ["none", "-"]
    return [settings["optimizer.name"], f"{settings['model.learning_rate']:g}"]


def _is_trained(settings: dict[str, Any]) -> bool:
    return settings.get("train") != "none" and settings.get("evaluate.adapter") is None


def _mean_sd(values: Sequence[float | None]) -> str:
    if any(value is None for value in values):
        return "-"
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f}"


def _init_seconds(record: dict[str, Any]) -> float:
    """What the start cost when it was computed, also where a run found it in the cache."""
    computed = (record.get("init") or {}).get("seconds")
    return record["phases"]["init"]["seconds"] if computed is None else computed


def _reason(run: Run) -> str:
    error = run.record.get("error")
    if not error:
        return ""
    first_line = (error["message"].splitlines() or [""])[0]
    return f" ({error['type']}: {first_line})" if first_line else f" ({error['type']})"


def render(results: Results) -> None:
    """Print the table to the terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(results.columns):
        table.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
    for row in results.rows:
        table.add_row(*(Text(cell) for cell in row))
    # A number that is cut off is worse than a line that wraps: the table takes the width it needs.
    needed = Measurement.get(Console(width=10_000), Console().options.update(width=10_000), table)
    console = Console(width=max(make_console().width, needed.maximum))
    console.print(table)
    for note in results.notes:
        console.print(f"  not in the table: {note}", highlight=False, markup=False)


def to_markdown(results: Results) -> str:
    """Return the table as Markdown."""
    rule = ["---", "---", *("---:" for _ in results.columns[2:])]
    lines = [f"| {' | '.join(row)} |" for row in (results.columns, rule, *results.rows)]
    lines += ["", *(f"- not in the table: {note}" for note in results.notes)]
    return "\n".join(lines).rstrip() + "\n"


def to_csv(results: Results) -> str:
    """Return the table as CSV."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([results.columns, *results.rows])
    return buffer.getvalue()

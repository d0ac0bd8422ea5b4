"""What the page's overview shows: comparisons, figures, tables; plain data, ready for JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_one.reports.arms import LEARNING_RATE, Arm
from lora_one.reports.comparison import Block, Row
from lora_one.reports.figure import Figure, to_json
from lora_one.reports.groups import Group
from lora_one.reports.published import Number, as_printed, matching
from lora_one.reports.records import Run, is_number, is_trained
from lora_one.reports.statistics import RULE, mean, mean_of, sd
from lora_one.reports.style import DARK, DASHES, LIGHT, colour_indices, hues
from lora_one.reports.table import Results

# Names of tuned settings where there is little room.
SHORT = {
    LEARNING_RATE: "lr",
    "init.stable_gamma": "gamma",
    "optimizer.damping": "damping",
    "optimizer.lr_ratio": "lr ratio",
}


def overview(
    runs: Sequence[Run],
    blocks: Sequence[Block],
    figures: Sequence[Sequence[Figure]],
    results: Results,
    numbers: Sequence[Number],
    common: Mapping[str, Any],
) -> dict[str, Any]:
    """Return everything but the runs' own pages."""
    methods = [run.record["method"] for run in runs if run.status == "finished"]
    return {
        "colours": colour_indices(methods),
        "palette": {"light": LIGHT.palette, "dark": DARK.palette},
        "dashes": DASHES,
        "rule": RULE,
        "blocks": [
            _block(block, drawn, numbers) for block, drawn in zip(blocks, figures, strict=True)
        ],
        "settings": {
            "columns": results.columns,
            "rows": results.rows,
            "marks": [[row, column, mark] for (row, column), mark in results.marks.items()],
        },
        "notes": results.notes,
        "runs": run_table(runs),
        "common": dict(common),
    }


def common_settings(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the settings that every run with a configuration has, with one value."""
    known = [run.settings for run in runs if run.settings]
    if not known:
        return {}
    first, *others = known
    missing = object()
    return {
        key: value
        for key, value in first.items()
        if all(settings.get(key, missing) == value for settings in others)
    }


def run_table(runs: Sequence[Run]) -> dict[str, Any]:
    """Return one row per run folder, finished or not; numbers stay numbers, to be sorted."""
    metrics = sorted(
        {
            run.record["primary_metric"]
            for run in runs
            if isinstance(run.record.get("primary_metric"), str)
        }
    )
    columns = ["run", "status", "method", "optimiser", "lr", "seed", *metrics]
    columns += ["validation loss", "init s", "train s", "memory GB", "ended"]
    return {"columns": columns, "rows": [_run_row(run, metrics) for run in runs]}


def _run_row(run: Run, metrics: Sequence[str]) -> list[Any]:
    settings, record = run.settings, run.record
    trained = bool(settings) and is_trained(settings)
    row = [
        run.folder.name,
        run.status,
        _text(record.get("method")),
        _text(settings.get("optimizer.name")) if trained else None,
        _number(settings.get("model.learning_rate")) if trained else None,
        _number(settings.get("seed")),
    ]
    if run.status != "finished":
        # What a run that did not finish has measured is in its own page, not beside results.
        return [*row, *(None for _ in metrics), None, None, None, None, _text(record.get("ended"))]
    alone = Group((run,))
    return [
        *row,
        *(_number(record["metrics"].get(name)) for name in metrics),
        alone.validation_losses[0],
        alone.init_seconds[0],
        alone.train_seconds[0],
        alone.peak_memory / 1e9,
        _text(record.get("ended")),
    ]


def _block(block: Block, figures: Sequence[Figure], numbers: Sequence[Number]) -> dict[str, Any]:
    arms = [(row.arm.name, row.arm.chosen.method, row.arm.chosen.optimiser) for row in block.rows]
    return {
        "title": block.title,
        "metric": block.metric,
        "higher": block.higher_is_better,
        "warnings": list(block.warnings),
        "rows": [
            _row(row, hue, block, numbers) for row, hue in zip(block.rows, hues(arms), strict=True)
        ],
        # Differences stand in the comparison itself.
        "figures": [to_json(figure) for figure in figures if not figure.rows],
    }


def _row(row: Row, hue: str, block: Block, numbers: Sequence[Number]) -> dict[str, Any]:
    arm, chosen = row.arm, row.arm.chosen
    values, losses = chosen.values(block.metric), chosen.validation_losses
    difference = row.difference
    return {
        "name": arm.name,
        "hue": hue,
        "optimiser": chosen.optimiser,
        "lr": chosen.learning_rate,
        "chosen": chosen_words(arm),
        "chosenBy": arm.chosen_by,
        "edge": list(arm.at_edge),
        "grid": {key: values for key, values in arm.grid.items() if len(values) > 1},
        "tried": arm.budget,
        "runs": arm.runs,
        "seeds": len(chosen.runs),
        "mean": mean_of(values),
        "sd": None if mean_of(values) is None else sd(values),
        "loss": mean_of(losses),
        "lossSd": None if mean_of(losses) is None else sd(losses),
        "isBest": row.is_best,
        "isTie": row.is_tie,
        "difference": None if difference is None else difference.mean,
        "interval": None if difference is None else difference.interval,
        "bootstrap": None if difference is None else difference.bootstrap,
        "pairs": None if difference is None else difference.n,
        "verdict": row.verdict,
        "initSeconds": mean(chosen.init_seconds),
        "trainSeconds": mean(chosen.train_seconds),
        "allSeconds": arm.seconds,
        "memory": chosen.peak_memory / 1e9,
        "members": [run.folder.name for run in chosen.runs],
        "published": [describe_number(number) for number in matching(chosen, numbers)],
    }


def chosen_words(arm: Arm) -> str:
    """Say which point of its grid an arm stands at."""
    settings = arm.chosen.settings
    parts = [
        f"{SHORT[key]} {_as_word(settings[key])}"
        for key, values in arm.grid.items()
        if key == LEARNING_RATE or len(values) > 1
    ]
    return ", ".join(parts) or "-"


def _as_word(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def describe_number(number: Number) -> dict[str, Any]:
    """Return a published number as the page and the tables show it."""
    return {
        "table": number.table,
        "row": number.row,
        "column": number.column,
        "metric": number.metric,
        # Beside our own numbers, which are fractions with four decimals.
        "text": as_printed(number.value, number.spread, 4 if number.is_percent else None),
        "mark": number.mark,
        "kind": number.kind,
        "source": number.source,
        "url": number.url,
        "n": number.n,
        "unknown": list(number.unknown),
        "notes": list(number.notes),
        "doubt": number.doubt,
    }


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _number(value: Any) -> float | int | None:
    return value if is_number(value) else None

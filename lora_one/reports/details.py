"""What the page shows of a single run: bounded in size, and said so where something is left out."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lora_one.reports.figure import rounded
from lora_one.reports.records import Run, is_number
from lora_one.reports.traces import Curve, Points, Trace, curve


@dataclass(frozen=True)
class Detail:
    """How much of a run goes into the page.

    Attributes:
        buckets: Points per curve.
        replies: Sample predictions.
        characters: Of a prompt or reply.
        layers: Layers of the init report.
    """

    buckets: int
    replies: int
    characters: int
    layers: int


# From the most to the least: the page takes the first one that keeps it below its size limit.
LEVELS = (
    Detail(buckets=600, replies=24, characters=4000, layers=400),
    Detail(buckets=300, replies=12, characters=1500, layers=240),
    Detail(buckets=120, replies=6, characters=600, layers=48),
    Detail(buckets=60, replies=2, characters=300, layers=8),
)
# Sample predictions are looked for among the first rows of the file only.
LOOKED_AT = 400
NOT_SHOWN = ("error", "preempted", "run_id", "process", "phases", "metrics", "losses")


def describe_run(
    run: Run,
    trace: Trace,
    init: Mapping[str, Any],
    common: Mapping[str, Any],
    detail: Detail,
) -> dict[str, Any]:
    """Return everything the run's page shows, ready for JSON.

    Args:
        run: The run.
        trace: Its ``metrics.jsonl``.
        init: Its ``init.json``.
        common: Settings that all runs share; they are in the page once.
        detail: How much.
    """
    record = run.record
    layers = init.get("layers")
    layers = [layer for layer in layers if isinstance(layer, dict)] if _is_list(layers) else []
    return {
        "settings": {k: v for k, v in run.settings.items() if k not in common or common[k] != v},
        "facts": {key: value for key, value in record.items() if key not in NOT_SHOWN},
        "metrics": record.get("metrics") or {},
        "losses": record.get("losses") or {},
        "phases": record.get("phases") or {},
        "error": record.get("error"),
        "preempted": record.get("preempted"),
        "problem": run.problem,
        "init": {key: value for key, value in init.items() if key != "layers"},
        "layers": [_layer(layer) for layer in layers[: detail.layers]],
        "layersInAll": len(layers),
        "loss": _curve(curve([trace.loss], detail.buckets)),
        "validation": _curve(curve([trace.validation], detail.buckets)),
        "metric": _curve(curve([trace.metric], detail.buckets)),
        "angles": {side: _layers(layers, detail) for side, layers in trace.angles.items()},
        "norms": _layers(trace.update_norms, detail),
        "spectra": {
            layer: rounded(values)
            for layer, values in islice(trace.update_spectra.items(), detail.layers)
        },
        "log": {"lines": trace.lines, "skipped": trace.skipped, "notFinite": trace.not_finite},
        "replies": sample_replies(run.folder, detail),
    }


def read_init(folder: Path) -> dict[str, Any]:
    """Return ``init.json``; empty where there is none that can be read."""
    try:
        report = json.loads((folder / "init.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def sample_replies(folder: Path, detail: Detail) -> dict[str, Any]:
    """Choose sample predictions: as many right as wrong ones, the first of each in the file.

    Returns:
        ``rows``, in file order; ``of``, how many rows were looked at; ``skipped``, how many of
        them were no JSON objects.
    """
    right: list[tuple[int, dict[str, Any]]] = []
    wrong: list[tuple[int, dict[str, Any]]] = []
    read = skipped = 0
    for row in islice(_rows(folder / "predictions.jsonl"), LOOKED_AT):
        read += 1
        if row is None:
            skipped += 1
            continue
        (right if _is_right(row) else wrong).append((read, row))
        if min(len(right), len(wrong)) >= detail.replies // 2:
            break
    half = detail.replies // 2
    of_right = max(half, detail.replies - len(wrong))
    taken = right[:of_right]
    taken += wrong[: detail.replies - len(taken)]
    rows = [_reply(row, detail) for _, row in sorted(taken, key=lambda pair: pair[0])]
    return {"rows": rows, "of": read, "skipped": skipped}


def _rows(file: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the rows of a JSON-lines file, None for a line that holds none."""
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                yield row if isinstance(row, dict) else None
    except FileNotFoundError:
        return


def _is_right(row: Mapping[str, Any]) -> bool:
    """Tell whether the first scorer, the primary one, accepted the reply."""
    scores = row.get("scores")
    if not isinstance(scores, dict) or not scores:
        return False
    first = next(iter(scores.values()))
    return isinstance(first, dict) and first.get("correct") is True


def _reply(row: Mapping[str, Any], detail: Detail) -> dict[str, Any]:
    prompt = row.get("prompt", row.get("texts"))
    scores = row.get("scores")
    return {
        "id": _short(row.get("row_id"), detail),
        "prompt": _short(prompt, detail),
        "reply": _short(row.get("reply"), detail),
        "gold": _short(row.get("reference"), detail),
        "right": _is_right(row),
        "stop": _short(row.get("stop_reason"), detail),
        "tokens": row.get("tokens") if isinstance(row.get("tokens"), int) else None,
        "scores": {
            str(name): {
                "parsed": _short(score.get("parsed"), detail),
                "right": score.get("correct") is True,
            }
            for name, score in (scores.items() if isinstance(scores, dict) else ())
            if isinstance(score, dict)
        },
    }


def _short(value: Any, detail: Detail) -> str | None:
    """Return text of bounded length; None stays None, so that no answer is not an empty one."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    rest = len(text) - detail.characters
    return text if rest <= 0 else f"{text[: detail.characters]} … ({rest:,} characters more)"


def _layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what the page shows of a layer, its numbers to five digits."""
    values = layer.get("singular_values")
    numbers = [value for value in values if is_number(value)] if _is_list(values) else []
    kept = {
        key: float(f"{layer[key]:.5g}")
        for key in ("next_singular_value", "svd_error", "captured_energy", "norm_ratio")
        if is_number(layer.get(key))
    }
    return kept | {
        "name": str(layer.get("name")),
        "shape": layer.get("shape"),
        "rank": layer.get("rank"),
        "singular_values": rounded(numbers),
    }


def _layers(layers: Mapping[str, Points], detail: Detail) -> dict[str, Any]:
    shown = islice(layers.items(), detail.layers)
    return {layer: _curve(curve([points], detail.buckets)) for layer, points in shown}


def _curve(drawn: Curve) -> dict[str, Any]:
    """Return a curve for the page; an exact one has no band to be sent."""
    facts: dict[str, Any] = {
        "x": rounded(drawn.x),
        "y": rounded(drawn.y),
        "points": drawn.points,
    }
    if not drawn.is_exact:
        facts |= {"low": rounded(drawn.low), "high": rounded(drawn.high)}
    return facts


def _is_list(value: Any) -> bool:
    return isinstance(value, list)

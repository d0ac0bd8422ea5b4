"""What was logged during a run, and curves of it that are small enough to show.

``metrics.jsonl`` holds one JSON object per line. Keys read here:

=====================================  =============================================================
``step``                               optimiser steps done; every line has it
``epoch``                              passes over the training rows; may be missing
``loss``                               training loss
``validation_loss``                    validation loss; ``base_validation_loss`` is the base model's
a metric's name, such as ``accuracy``  the metric at that step
``principal_angle_B/<layer>``          largest principal angle, in degrees, between the columns of
                                       lora_B and the left singular space of the one-step gradient
``principal_angle_A/<layer>``          the same of lora_A's rows and the right singular space
``update_norm/<layer>``                Frobenius norm of ``s B A``, less that of the start if offset
=====================================  =============================================================

A line that cannot be read, such as the torn last one of a killed run, is counted and skipped.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ANGLES = {"principal_angle_B/": "B", "principal_angle_A/": "A"}
UPDATE_NORM = "update_norm/"


@dataclass(frozen=True)
class Points:
    """Values over an axis, in the order of the axis.

    Attributes:
        x: Steps or epochs.
        y: As many values.
    """

    x: Floats
    y: Floats

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Trace:
    """One run's ``metrics.jsonl``.

    Attributes:
        loss: Training loss over steps.
        validation: Validation loss over epochs (over steps where no epoch was logged).
        metric: The primary metric over epochs.
        angles: ``A`` and ``B`` -> layer -> largest principal angle in degrees over steps.
        update_norms: Layer -> norm of the update over steps.
        lines: How many lines could be read.
        skipped: How many could not.
        not_finite: How many training losses were infinite or not a number; no curve shows them.
    """

    loss: Points
    validation: Points
    metric: Points
    angles: dict[str, dict[str, Points]] = field(default_factory=dict)
    update_norms: dict[str, Points] = field(default_factory=dict)
    lines: int = 0
    skipped: int = 0
    not_finite: int = 0


@dataclass(frozen=True)
class Curve:
    """Points, or what is left of many of them.

    Attributes:
        x: Where a bucket lies: the mean of its points' places.
        y: Mean of a bucket.
        low: Smallest value of a bucket.
        high: Largest value of a bucket: no spike is lost.
        points: How many values the curve stands for.
    """

    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]
    points: int

    @property
    def is_exact(self) -> bool:
        """Whether every value is shown as it is."""
        return self.points == len(self.x)


def read_trace(folder: Path, metric: str) -> Trace:
    """Read ``metrics.jsonl``; a missing file is an empty trace."""
    lines, skipped = _read_lines(folder / "metrics.jsonl")
    loss, validation, scores = _Collector(), _Collector(), _Collector()
    angles: dict[str, dict[str, _Collector]] = {}
    norms: dict[str, _Collector] = {}
    epoch: float | None = None
    for line in lines:
        step = line.get("step")
        if "epoch" in line:
            epoch = line["epoch"]
        if "loss" in line:
            loss.add(step, line["loss"])
        if "validation_loss" in line:
            validation.add(line.get("epoch", step), line["validation_loss"])
        if metric in line and metric != "validation_loss":
            scores.add(step if epoch is None else epoch, line[metric])
        if len(line) > 1 and any("/" in key for key in line):
            _collect_layers(line, step, angles, norms)
    return Trace(
        loss=loss.points(),
        validation=validation.points(),
        metric=scores.points(),
        angles={
            side: {layer: collector.points() for layer, collector in layers.items()}
            for side, layers in angles.items()
        },
        update_norms={layer: collector.points() for layer, collector in norms.items()},
        lines=len(lines),
        skipped=skipped,
        not_finite=loss.dropped,
    )


class _Collector:
    """Pairs of numbers, growing."""

    def __init__(self) -> None:
        self.x: list[float] = []
        self.y: list[float] = []
        self.dropped = 0

    def add(self, x: Any, y: Any) -> None:
        if _is_finite(x) and _is_finite(y):
            self.x.append(x)
            self.y.append(y)
        else:
            self.dropped += 1

    def points(self) -> Points:
        x, y = np.asarray(self.x, dtype=np.float64), np.asarray(self.y, dtype=np.float64)
        order = np.argsort(x, kind="stable")
        return Points(x[order], y[order])


def _is_finite(value: Any) -> bool:
    # type() and not isinstance(): True and False are no measurements, and this is called often.
    return type(value) in (float, int) and math.isfinite(value)


def _collect_layers(
    line: dict[str, Any],
    step: Any,
    angles: dict[str, dict[str, _Collector]],
    norms: dict[str, _Collector],
) -> None:
    for key, value in line.items():
        if key.startswith(UPDATE_NORM):
            norms.setdefault(key.removeprefix(UPDATE_NORM), _Collector()).add(step, value)
        for prefix, side in ANGLES.items():
            if key.startswith(prefix):
                layers = angles.setdefault(side, {})
                layers.setdefault(key.removeprefix(prefix), _Collector()).add(step, value)


def _read_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the objects of a JSON-lines file, and how many lines are none."""
    try:
        text = file.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return [], 0
    lines = [line for line in text.split("\n") if line.strip()]
    try:
        # One call for the whole file is three times as fast as one per line.
        values = json.loads(f"[{','.join(lines)}]")
        skipped = 0
    except ValueError:
        values = list(_parsed(lines))
        skipped = len(lines) - len(values)
    objects = [value for value in values if isinstance(value, dict)]
    return objects, skipped + len(values) - len(objects)


def _parsed(lines: Iterable[str]) -> Iterable[Any]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def curve(parts: Sequence[Points], buckets: int) -> Curve:
    """Reduce the points of one or several runs to at most ``buckets`` buckets of equal width.

    Where every place has one value and there are no more places than buckets, nothing is lost.
    Otherwise a bucket keeps the mean, the smallest and the largest of its values.
    """
    x = np.concatenate([part.x for part in parts]) if parts else np.empty(0)
    y = np.concatenate([part.y for part in parts]) if parts else np.empty(0)
    if not len(x):
        return Curve([], [], [], [], 0)
    places, at = np.unique(x, return_inverse=True)
    if len(places) > buckets:
        edges = np.linspace(places[0], places[-1], buckets + 1)
        at = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, buckets - 1)
    count = np.bincount(at)
    used = count > 0
    low, high = np.full(len(count), np.inf), np.full(len(count), -np.inf)
    np.minimum.at(low, at, y)
    np.maximum.at(high, at, y)
    return Curve(
        x=(np.bincount(at, x)[used] / count[used]).tolist(),
        y=(np.bincount(at, y)[used] / count[used]).tolist(),
        low=low[used].tolist(),
        high=high[used].tolist(),
        points=len(x),
    )


def median_over_layers(layers: dict[str, Points]) -> tuple[Floats, Floats, Floats, Floats]:
    """Return steps, and per step the median, smallest and largest value over all layers."""
    x = np.concatenate([points.x for points in layers.values()])
    y = np.concatenate([points.y for points in layers.values()])
    steps, starts = np.unique(x[order := np.argsort(x, kind="stable")], return_index=True)
    parts = np.split(y[order], starts[1:])
    statistics = [(np.median(part), part.min(), part.max()) for part in parts]
    middle, low, high = np.array(statistics).T
    return steps, middle, low, high

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
``update_norm/<layer>``                Frobenius norm of the update ``s (B A - B0 A0)``
``update_singular_values/<layer>``     singular values of the update, descending; the last ones are
                                       drawn
=====================================  =============================================================

An angle is null where there is none, as of lora_B while it is zero.

A line that cannot be read, such as the torn last one of a killed run, is counted and skipped.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pj
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ANGLES = {"principal_angle_B": "B", "principal_angle_A": "A"}
UPDATE_NORM = "update_norm"
NUMBERS = tuple(f"{kind}/" for kind in (*ANGLES, UPDATE_NORM))
SPECTRUM = "update_singular_values/"


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
        update_spectra: Layer -> singular values of the update at the last step that has them.
        lines: How many lines could be read.
        skipped: How many could not.
        not_finite: How many training losses were infinite or not a number; no curve shows them.
    """

    loss: Points
    validation: Points
    metric: Points
    angles: dict[str, dict[str, Points]] = field(default_factory=dict)
    update_norms: dict[str, Points] = field(default_factory=dict)
    update_spectra: dict[str, list[float]] = field(default_factory=dict)
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
    try:
        content = (folder / "metrics.jsonl").read_bytes()
    except FileNotFoundError:
        content = b""
    log = _read_fast(content, metric) or _read_line_by_line(content, metric)
    columns = log.columns
    # A metric is logged without its epoch: that of the last line that named one.
    epochs = _filled(columns["epoch"])
    steps = columns["step"]
    return Trace(
        loss=_points(steps, columns["loss"]),
        validation=_points(
            np.where(np.isnan(columns["epoch"]), steps, columns["epoch"]),
            columns["validation_loss"],
        ),
        metric=_points(np.where(np.isnan(epochs), steps, epochs), columns["metric"]),
        angles=log.angles,
        update_norms=log.update_norms,
        update_spectra=log.update_spectra,
        lines=log.lines,
        skipped=log.skipped,
        not_finite=log.not_finite,
    )


@dataclass
class _Log:
    """The numbers of a log, one entry per line; NaN where a line has none."""

    columns: dict[str, Floats]
    lines: int
    skipped: int = 0
    not_finite: int = 0
    angles: dict[str, dict[str, Points]] = field(default_factory=dict)
    update_norms: dict[str, Points] = field(default_factory=dict)
    update_spectra: dict[str, list[float]] = field(default_factory=dict)


def _names(metric: str) -> dict[str, str | None]:
    """Return our columns and the keys they are read from."""
    # A metric called like a loss is drawn as that loss already.
    key = metric if metric and metric not in ("loss", "validation_loss") else None
    plain = {name: name for name in ("step", "epoch", "loss", "validation_loss")}
    return plain | {"metric": key}


def _read_fast(content: bytes, metric: str) -> _Log | None:
    """Read a log without fault, in C; None for any other, which is read line by line."""
    if not content.strip() or any(prefix.encode() in content for prefix in (*NUMBERS, SPECTRUM)):
        return None
    names = _names(metric)
    schema = pa.schema([(key, pa.float64()) for key in names.values() if key is not None])
    options = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    block = pj.ReadOptions(use_threads=False, block_size=len(content) + 1)
    try:
        table = pj.read_json(pa.BufferReader(content), block, options)
    except pa.ArrowInvalid:
        return None
    empty = np.full(table.num_rows, np.nan)
    columns = {
        name: empty if key is None else table.column(key).to_numpy() for name, key in names.items()
    }
    return _Log(columns, table.num_rows)


def _read_line_by_line(content: bytes, metric: str) -> _Log:
    lines, skipped = _objects(content.decode("utf-8", errors="replace"))
    columns = {
        name: np.array([_finite(line.get(key)) for line in lines], dtype=np.float64)
        for name, key in _names(metric).items()
    }
    logged = sum(line.get("loss") is not None for line in lines)
    log = _Log(columns, len(lines), skipped)
    log.not_finite = logged - int(np.isfinite(columns["loss"]).sum())
    per_layer: dict[str, tuple[list[float], list[float]]] = {}
    for line in lines:
        for key in line:
            if key.startswith(NUMBERS):
                x, y = per_layer.setdefault(key, ([], []))
                x.append(_finite(line.get("step")))
                y.append(_finite(line[key]))
            elif key.startswith(SPECTRUM) and _is_spectrum(line[key]):
                log.update_spectra[key.removeprefix(SPECTRUM)] = line[key]
    for key, (x, y) in per_layer.items():
        kind, _, layer = key.partition("/")
        points = _points(np.array(x), np.array(y))
        if not len(points):
            continue
        if kind == UPDATE_NORM:
            log.update_norms[layer] = points
        else:
            log.angles.setdefault(ANGLES[kind], {})[layer] = points
    return log


def _finite(value: Any) -> float:
    # type() and not isinstance(): True and False are no measurements.
    return value if type(value) in (float, int) and math.isfinite(value) else math.nan


def _is_spectrum(value: Any) -> bool:
    return isinstance(value, list) and all(math.isfinite(_finite(one)) for one in value)


def _points(x: Floats, y: Floats) -> Points:
    there = np.isfinite(x) & np.isfinite(y)
    x, y = x[there], y[there]
    order = np.argsort(x, kind="stable")
    return Points(x[order], y[order])


def _filled(values: Floats) -> Floats:
    """Put the last number before it in the place of each NaN, where there is one."""
    places = np.where(np.isnan(values), 0, np.arange(len(values)))
    return values[np.maximum.accumulate(places)] if len(values) else values


def _objects(text: str) -> tuple[list[dict[str, Any]], int]:
    """Return the objects of a JSON-lines file, and how many lines are none."""
    found, skipped = [], 0
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            skipped += 1
    return found, skipped


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

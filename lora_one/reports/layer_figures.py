"""The figures of what was recorded layer by layer: of the start, and while it trained."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lora_one.harness.config.schema import GRADIENT_METHODS
from lora_one.reports.arms import Arm
from lora_one.reports.figure import Evidence, Figure, Series
from lora_one.reports.records import Run, is_number
from lora_one.reports.traces import Points, Trace, median_over_layers

# Singular values below this part of the largest are rounding.
ROUNDING = 1e-6


def layer_figures(arms: Sequence[Arm], evidence: Evidence) -> list[Figure | None]:
    """Return the figures of the gradient's spectrum and of the diagnostics; None without any."""
    return [
        _spectra(arms, evidence),
        _angles(arms, evidence, "B"),
        _angles(arms, evidence, "A"),
        _norms(arms, evidence),
        _update_spectra(arms, evidence),
    ]


def _spectrum(layer: Mapping[str, Any]) -> list[float]:
    """Return a layer's singular values and the next one, over the first; or nothing."""
    values = layer.get("singular_values") or []
    following = layer.get("next_singular_value")
    values = [*values, *([] if following is None else [following])]
    if not values or not all(map(is_number, values)) or values[0] <= 0:
        return []
    return [value / values[0] for value in values]


def _spectra(arms: Sequence[Arm], evidence: Evidence) -> Figure | None:
    series, drawn = [], set()
    for arm in arms:
        method = arm.chosen.method.removeprefix("dora_")
        # The gradient is the base model's: an optimiser does not change it.
        if method not in GRADIENT_METHODS or method in drawn:
            continue
        rows = [row for run in arm.chosen.runs for row in _spectra_of(run, evidence)]
        if not rows:
            continue
        drawn.add(method)
        series.append(Series(method, method, arm.chosen.optimiser, "line", *_by_index(rows)))
    if not series:
        return None
    return Figure(
        "spectra",
        "Singular values of the one-step gradient",
        "index of the singular value",
        "σᵢ / σ₁",
        "Line: median over layers and seeds; band: quartiles. The last value is the largest one "
        "that the start leaves out.",
        tuple(series),
        y_log=True,
    )


def _by_index(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return, over spectra: index, median, lower and upper quartile."""
    longest = max(map(len, rows))
    by_index = [[row[at] for row in rows if len(row) > at] for at in range(longest)]
    low, middle, high = np.array([np.percentile(values, [25, 50, 75]) for values in by_index]).T
    return [np.arange(1.0, longest + 1).tolist(), middle.tolist(), low.tolist(), high.tolist()]


def _spectra_of(run: Run, evidence: Evidence) -> list[list[float]]:
    layers = evidence.inits.get(run.folder.name, {}).get("layers")
    if not isinstance(layers, list):
        return []
    return [row for layer in layers if isinstance(layer, dict) and (row := _spectrum(layer))]


def _over_layers(
    arms: Sequence[Arm], evidence: Evidence, layers_of: Callable[[Trace], dict[str, Points]]
) -> tuple[Series, ...]:
    """One line per arm: the median over layers and seeds of what was logged per layer."""
    series = []
    for arm in arms:
        logged = [
            layers for trace in evidence.traces_of(arm.chosen) if (layers := layers_of(trace))
        ]
        if not logged:
            continue
        merged = {f"{at}/{name}": p for at, one in enumerate(logged) for name, p in one.items()}
        steps, middle, low, high = (values.tolist() for values in median_over_layers(merged))
        chosen = arm.chosen
        series.append(
            Series(arm.name, chosen.method, chosen.optimiser, "line", steps, middle, low, high)
        )
    return tuple(series)


def _angles(arms: Sequence[Arm], evidence: Evidence, side: str) -> Figure | None:
    series = _over_layers(arms, evidence, lambda trace: trace.angles.get(side, {}))
    if not series:
        return None
    factor = "lora_B's columns and the left" if side == "B" else "lora_A's rows and the right"
    return Figure(
        f"angles-{side.lower()}",
        f"Principal angle of {side} to the one-step gradient",
        "step",
        "largest angle, degrees",
        f"Between {factor} singular space of the one-step gradient. Line: median over layers and "
        "seeds; band: smallest to largest.",
        series,
    )


def _norms(arms: Sequence[Arm], evidence: Evidence) -> Figure | None:
    series = _over_layers(arms, evidence, lambda trace: trace.update_norms)
    if not series:
        return None
    return Figure(
        "update-norm",
        "Norm of the update",
        "step",
        "Frobenius norm",
        "Of s (B A - B0 A0), what training has added to the start. Line: median over layers and "
        "seeds; band: smallest to largest.",
        series,
    )


def _update_spectra(arms: Sequence[Arm], evidence: Evidence) -> Figure | None:
    series = []
    for arm in arms:
        spectra = [s for t in evidence.traces_of(arm.chosen) for s in t.update_spectra.values()]
        # Without what is lost in rounding: a logarithm would draw nothing else.
        rows = [[v / s[0] for v in s if v > ROUNDING * s[0]] for s in spectra if s and s[0] > 0]
        if rows:
            chosen = arm.chosen
            drawn = _by_index(rows)
            series.append(Series(arm.name, chosen.method, chosen.optimiser, "line", *drawn))
    if not series:
        return None
    return Figure(
        "update-spectrum",
        "Singular values of the update, last step",
        "index of the singular value",
        "σᵢ / σ₁",
        "Of s (B A - B0 A0). Line: median over layers and seeds; band: quartiles. "
        "A start other than 0 gives an update of rank 2 r.",
        tuple(series),
        y_log=True,
    )

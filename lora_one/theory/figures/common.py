"""What the pictures share."""

import math
from collections.abc import Sequence

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import NullLocator, ScalarFormatter
from torch import Tensor

from lora_one.plot_style import METHOD_COLOURS, SEQUENTIAL
from lora_one.theory.descent import Trace

METHOD_OF_LABEL = {
    "LoRA": "lora",
    "PiSSA": "pissa",
    "LoRA-GA": "lora_ga",
    "LoRA-One": "lora_one",
    "full": "full_ft",
}
STYLES = {"LoRA": ("o", ":"), "LoRA-GA": ("s", "--"), "LoRA-One": ("D", "-")}
ROUNDING = 1e-17
"""Where zeros are drawn on a logarithmic axis."""


def band(axes: Axes, x: Tensor, series: Tensor, colour: str, label: str, line: str = "-") -> None:
    """Draw the median over the last dimension, and the range."""
    series = series.clamp(min=ROUNDING)
    axes.plot(x, series.median(-1).values, color=colour, label=label, ls=line)
    axes.fill_between(x, series.amin(-1), series.amax(-1), color=colour, alpha=0.18, lw=0)


def stack(traces: Sequence[Trace], name: str) -> Tensor:
    """Return one measure of several descents, (steps, descents)."""
    return torch.stack([trace[name] for trace in traces], -1)


def number_ticks(axis: Axis, numbers: Sequence[float]) -> None:
    """Label a logarithmic axis with plain numbers."""
    axis.set_ticks(list(numbers))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(ScalarFormatter())


def power(number: float) -> str:
    """Write a power of ten as such, and other numbers as they are."""
    exponent = round(math.log10(number))
    return f"$10^{{{exponent}}}$" if math.isclose(number, 10.0**exponent) else f"{number:g}"


def shades(count: int) -> list[tuple[float, ...]]:
    """Return colours from dark to light for series in an order."""
    return [colormaps[SEQUENTIAL](0.9 * i / max(count - 1, 1)) for i in range(count)]


def colour_of(method: str) -> str:
    """Return the colour of a method by its name in a legend."""
    return METHOD_COLOURS[METHOD_OF_LABEL[method]]

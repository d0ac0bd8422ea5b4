"""Figures as PNG and SVG files, drawn by matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_one.reports.figure import Figure, Series
from lora_one.reports.style import DASHES, LIGHT, MARKERS, colour_indices, matplotlib_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (6.4, 4.0)
FORMATS = ("png", "svg")
# Lines of so many points show each of them.
FEW = 12
# More names than this go below the axes, two beside each other, each pair in so many inches.
INSIDE, PAIR = 6, 0.22


def write_plots(figures: Sequence[Figure], folder: Path, prefix: str = "") -> list[Path]:
    """Draw every figure into ``<folder>/<prefix><key>.png`` and ``.svg``.

    Raises:
        OSError: A file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    written = []
    with mpl.rc_context(matplotlib_settings(LIGHT)):
        for figure in figures:
            names = {series.name for series in figure.series if not series.faint}
            below = len(names) > INSIDE and not figure.rows
            width, height = SIZE
            height += PAIR * math.ceil(len(names) / 2) if below else 0
            canvas = Canvas(figsize=(width, height), layout="constrained")
            FigureCanvasAgg(canvas)
            # What comes from run folders may hold a dollar sign, which would start a formula.
            canvas.suptitle(_plain(figure.title), x=0.01, ha="left", fontweight="bold")
            axes = canvas.subplots()
            _draw(axes, figure)
            labels = axes.get_legend_handles_labels()[1]
            if below:
                canvas.legend(loc="outside lower left", ncols=2, frameon=False, fontsize="x-small")
            elif len(labels) > 1:
                axes.legend()
            # Laid out once for both formats: it takes half of the time.
            canvas.draw_without_rendering()
            canvas.set_layout_engine("none")
            for suffix in FORMATS:
                file = folder / f"{prefix}{figure.key}.{suffix}"
                # No date: the same numbers give the same file.
                canvas.savefig(file, metadata={"Date": None} if suffix == "svg" else None)
                written.append(file)
    return written


def _draw(axes: "Axes", figure: Figure) -> None:
    axes.set_xlabel(_plain(figure.x_label))
    axes.set_ylabel(_plain(figure.y_label))
    if figure.x_log:
        axes.set_xscale("log")
    if figure.y_log:
        axes.set_yscale("log")
    colours = colour_indices([series.method for series in figure.series])
    optimisers = list(dict.fromkeys(series.optimiser for series in figure.series))
    marker = "o" if all(len(series.x) <= FEW for series in figure.series) else None
    named: set[str] = set()
    for series, hue in zip(figure.series, figure.hues, strict=True):
        at = optimisers.index(series.optimiser)
        colour = LIGHT.palette[colours[hue]] if hue else LIGHT.muted
        label = None if series.name in named or series.faint else _plain(series.name)
        if label is not None:
            named.add(series.name)
        if figure.rows:
            _draw_interval(axes, series, colour)
        elif series.kind == "points":
            _draw_points(axes, series, colour, MARKERS[at % len(MARKERS)], label)
        elif series.kind == "front":
            axes.step(
                series.x,
                series.y,
                where="post",
                color=colour,
                label=label,
                linewidth=1,
                linestyle=(0, (4, 3)),
                zorder=1,
            )
        else:
            _draw_line(axes, series, colour, DASHES[at % len(DASHES)], label, marker)
    if figure.rows:
        axes.axvline(0, color=LIGHT.muted, linewidth=1)
        axes.set_yticks(range(len(figure.rows)), [_plain(row) for row in figure.rows])
        axes.set_ylim(len(figure.rows) - 0.5, -0.5)


def _draw_line(
    axes: "Axes",
    series: Series,
    colour: str,
    dashes: tuple[float, ...],
    label: str | None,
    marker: str | None,
) -> None:
    style = (0, dashes) if dashes else "-"
    axes.plot(
        series.x,
        series.y,
        color=colour,
        linestyle=style,
        label=label,
        marker=marker,
        markersize=3.5,
    )
    if series.low and series.low != series.high:
        axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.14, linewidth=0)


def _draw_points(
    axes: "Axes",
    series: Series,
    colour: str,
    marker: str,
    label: str | None,
) -> None:
    axes.plot(
        series.x,
        series.y,
        color=colour,
        marker=marker,
        linestyle="none",
        label=label,
        markersize=3.5 if series.faint else 8,
        alpha=0.55 if series.faint else 1.0,
        markeredgecolor=LIGHT.background,
        markeredgewidth=0.4,
    )


def _draw_interval(axes: "Axes", series: Series, colour: str) -> None:
    axes.hlines(series.y, series.low, series.high, color=colour, linewidth=2.4)
    axes.plot(series.x, series.y, "o", color=colour, markersize=6)


def _plain(text: str) -> str:
    return text.replace("\\", "\\\\").replace("$", r"\$")

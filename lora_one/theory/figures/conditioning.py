"""Pictures of experiment 4."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lora_one.plot_style import BLACK, BLUE, CYCLE, GREEN, ORANGE, RED, canvas, letter, styled
from lora_one.theory.conditioning import AdamRow, Iterations


@styled
def conditioning(
    conditions: Sequence[float],
    curves: Mapping[str, Tensor],
    counts: Sequence[Iterations],
    limit: int,
) -> Figure:
    """Errors by step, steps against κ, and steps against κ for several dampings."""
    figure = canvas(3, width=4.9)
    first, second, third = figure.subplots(1, 3)
    for label, line in (("gradient descent", "-"), ("preconditioned", "--")):
        for i, condition in enumerate(conditions):
            first.plot(
                curves[label][:, i].clamp(min=1e-16),
                color=CYCLE[i],
                ls=line,
                label=f"κ = {condition:g}" if line == "-" else None,
            )
    first.set_yscale("log")
    first.legend(loc="upper right", title="solid plain, dashed preconditioned", ncols=2)
    first.set_ylim(1e-17, 1e3)
    letter(
        first,
        "(a) error from the spectral start",
        "step t",
        "$\\|A_tB_t - \\Delta\\|_F\\,/\\,\\|\\Delta\\|_F$",
    )
    colours = iter((BLUE, GREEN, ORANGE, RED))
    for row, marker in zip(counts, "osD^v", strict=False):
        colour = BLACK if row.label == "gradient descent" else next(colours)
        panels = (
            [second, third]
            if row.label == "preconditioned"
            else [second if row.label == "gradient descent" else third]
        )
        for axes in panels:
            _counts(axes, row, limit, colour, marker)
    for axes in (second, third):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(10, 6 * limit if axes is second else 3000)
        axes.legend(loc="upper left")
    letter(second, "(b) steps to $10^{-6}$", "condition number κ(Δ)", "steps")
    letter(third, "(c) the same, damped", "condition number κ(Δ)", "steps")
    return figure


def _counts(axes: Axes, row: Iterations, limit: int, colour: str, marker: str) -> None:
    steps = row.steps.median(-1).values
    x = torch.tensor(row.conditions, dtype=torch.float64)
    known = steps.isfinite()
    axes.plot(x[known], steps[known], color=colour, marker=marker, label=row.label)
    if not known.all():
        axes.plot(
            x[~known],
            torch.full_like(x[~known], limit),
            "^",
            mfc="none",
            color=colour,
            ms=9,
            label=f"not within {limit:,}",
        )


@styled
def adamw(rows: Sequence[AdamRow], steps: int) -> Figure:
    """Errors after a fixed number of AdamW steps against κ: geometric means over the seeds."""
    figure = canvas(1, width=8.6)
    axes = figure.subplots()
    for start, line in (("spectral", "-"), ("random", ":")):
        for label, colour, marker in (("AdamW", BLACK, "o"), ("preconditioned AdamW", BLUE, "s")):
            chosen = [r for r in rows if r.start == start and r.label == label]
            x = sorted({r.condition for r in chosen})
            y = torch.tensor([[r.error for r in chosen if r.condition == c] for c in x])
            axes.plot(
                x,
                y.log().mean(-1).exp(),
                color=colour,
                marker=marker,
                ls=line,
                label=f"{label}, {start} start",
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    letter(
        axes,
        f"after {steps} steps, rate decaying to 0",
        "condition number κ(Δ)",
        "$\\|AB - \\Delta\\|_F\\,/\\,\\|\\Delta\\|_F$",
    )
    return figure

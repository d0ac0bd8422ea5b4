"""Pictures of experiment 5."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure

from lora_one.plot_style import BLACK, BLUE, GREY, ORANGE, RED, canvas, letter, styled
from lora_one.theory.digits import DigitRun, Plane
from lora_one.theory.figures.common import band, colour_of, number_ticks
from lora_one.theory.nonlinear import Convergence, SampleRow


@styled
def relu_convergence(results: Sequence[Convergence]) -> Figure:
    """Errors by step in the ReLU model, one panel per condition number."""
    figure = canvas(len(results), width=4.4)
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    lines = {
        "random, plain": (BLACK, ":"),
        "spectral, plain": (ORANGE, "--"),
        "spectral, preconditioned": (BLUE, "-"),
    }
    for axes, result, name in zip(panels, results, "abcdef", strict=False):
        for label, (colour, line) in lines.items():
            axes.plot(result.errors[label].clamp(min=1e-16), color=colour, ls=line, label=label)
        axes.plot(result.bound(), color=GREY, lw=1.2, ls="-.", label="bound of theorem 4.2")
        axes.set_yscale("log")
        axes.set_ylim(1e-13, 3)
        letter(axes, f"({name}) κ = {result.condition:g}", "step t", "")
    panels[0].set_ylabel("$\\|A_tB_t - \\Delta\\|_F\\,/\\,\\|\\Delta\\|_F$")
    panels[-1].legend(loc="lower left")
    return figure


@styled
def sample_sizes(rows: Sequence[SampleRow]) -> Figure:
    """Alignment of the one-step gradient against the number of samples."""
    models = ("ReLU", "two layers")
    figure = canvas(3, width=4.9)
    panels = figure.subplots(1, 3, sharey=True)
    signals = sorted({row.signal for row in rows})
    what = (
        ("left", "(a) input side, $U_{r^*}$"),
        ("right", "(b) output side, $V_{r^*}$"),
        ("gap", "(c) error of the start, best γ"),
    )
    for axes, (name, title) in zip(panels, what, strict=True):
        for model, line, marker in zip(models, ("-", "--"), "os", strict=True):
            for signal, colour in zip(signals, (BLUE, RED), strict=False):
                chosen = [r for r in rows if r.model == model and r.signal == signal]
                N = sorted({r.samples for r in chosen})
                y = torch.tensor([[getattr(r, name) for r in chosen if r.samples == n] for n in N])
                axes.plot(
                    N,
                    y.median(-1).values,
                    color=colour,
                    ls=line,
                    marker=marker,
                    label=f"{model}, signal {signal:g}",
                )
        guide = torch.tensor([float(N[0]), float(N[-1])])
        axes.plot(
            guide, 0.45 * (guide / guide[0]) ** -0.5, color=GREY, lw=1.2, ls=":", label="slope −½"
        )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        number_ticks(axes.yaxis, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5))
        letter(axes, title, "samples N", "")
    panels[0].set_ylabel("sine of the angle, relative error")
    panels[0].legend(loc="lower left")
    return figure


@styled
def digits(runs: Sequence[Mapping[str, DigitRun]], plane: Plane) -> Figure:
    """Losses of full fine-tuning, LoRA and LoRA-One on digits, and their paths in a plane."""
    figure = canvas(2, width=5.4, height=4.2)
    left, right = figure.subplots(1, 2)
    for label, line in (("full", "-."), ("LoRA", ":"), ("LoRA-One", "-")):
        losses = torch.stack([run[label].loss for run in runs], -1)
        name = "full fine-tuning" if label == "full" else label
        band(left, torch.arange(len(losses)), losses, colour_of(label), name, line)
    left.set_yscale("log")
    left.legend()
    letter(left, "(a) fine-tuning on even digits", "step t", "training loss")
    height = plane.loss.log10()
    filled = right.contourf(plane.x, plane.y, height, levels=20, cmap="Greys", alpha=0.8)
    figure.colorbar(filled, ax=right, label="log$_{10}$ loss", shrink=0.9)
    for label, marker in (("full", "o"), ("LoRA", "s"), ("LoRA-One", "D")):
        path = plane.paths[label]
        right.plot(
            path[:, 0],
            path[:, 1],
            color=colour_of(label),
            marker=marker,
            ms=3.5,
            lw=1.5,
            markevery=4,
        )
        right.plot(path[-1:, 0], path[-1:, 1], "*", color=colour_of(label), ms=16, mec="white")
    right.grid(visible=False)
    letter(
        right,
        f"(b) the paths in a plane ({plane.share:.0%} of them)",
        "first direction",
        "second direction",
    )
    return figure

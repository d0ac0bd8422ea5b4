"""One function per picture of ``Toy_Experiments.ipynb``: results in, picture out."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter
from torch import Tensor

from lora_one.plot_style import (
    BLACK,
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    METHOD_COLOURS,
    ORANGE,
    RED,
    SEQUENTIAL,
    canvas,
    letter,
    styled,
)
from lora_one.theory.alignment import fit_log
from lora_one.theory.conditioning import AdamRow, Iterations
from lora_one.theory.descent import Trace
from lora_one.theory.digits import DigitRun, Plane
from lora_one.theory.language import OneStepLosses, TrainedRun, by_kind
from lora_one.theory.linear import AlignmentTime, RankRow, Tuned
from lora_one.theory.nonlinear import Convergence, SampleRow
from lora_one.theory.portrait import Path, Portrait

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


def _band(axes: Axes, x: Tensor, series: Tensor, colour: str, label: str, line: str = "-") -> None:
    """Draw the median over the last dimension, and the range."""
    series = series.clamp(min=ROUNDING)
    axes.plot(x, series.median(-1).values, color=colour, label=label, ls=line)
    axes.fill_between(x, series.amin(-1), series.amax(-1), color=colour, alpha=0.18, lw=0)


def _stack(traces: Sequence[Trace], name: str) -> Tensor:
    return torch.stack([trace[name] for trace in traces], -1)


def _number_ticks(axis: object, numbers: Sequence[float]) -> None:
    """Label a logarithmic axis with plain numbers."""
    axis.set_ticks(list(numbers))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(ScalarFormatter())


@styled
def alignment(traces: Sequence[Trace], theta: float, times: Sequence[AlignmentTime]) -> Figure:
    """Angles of A_t and B_t by step, and t* against d."""
    figure = canvas(2, width=5.2)
    left, right = figure.subplots(1, 2)
    steps = traces[0].steps
    _band(left, steps[1:], _stack(traces, "angle_B")[1:], RED, "$B_t$ to $V_{r^*}(G)$")
    _band(left, steps, _stack(traces, "angle_A"), BLUE, "$A_t$ to $U_{r^*}(G)$", "--")
    left.axhline(theta, color=GREY, lw=1, ls=":")
    left.set_yscale("log")
    left.set_ylim(1e-17, 5)
    left.legend(loc="center right")
    letter(left, "a  B is aligned after one step, A soon", "step t", "sine of the largest angle")
    conditions = sorted({row.condition for row in times})
    for condition, colour, marker in zip(conditions, (BLUE, ORANGE), "os", strict=False):
        rows = [row for row in times if row.condition == condition]
        d = torch.tensor([float(row.d) for row in rows])
        time = torch.tensor([row.steps * row.growth for row in rows])
        fit = fit_log(d, time)
        right.plot(d, time, marker, color=colour, alpha=0.55, mew=0)
        right.plot(
            d.unique(),
            fit(d.unique()),
            color=colour,
            label=f"κ = {condition:g}: slope {fit.slope:.2f} [{fit.low:.2f}, {fit.high:.2f}]",
        )
    right.set_xscale("log")
    _number_ticks(right.xaxis, sorted({row.d for row in times}))
    right.legend(loc="upper left", title="95 % interval of the slope; theorem: 0.50")
    low, high = right.get_ylim()
    right.set_ylim(low, high + 0.25 * (high - low))
    letter(
        right,
        "b  alignment time grows like ½ ln d",
        "input dimension d",
        "$t^*\\,\\ln(1 + \\eta\\lambda_{r^*}(G))$",
    )
    return figure


@styled
def size_of_start(runs: Mapping[int, Mapping[float, Sequence[Trace]]], shown: int) -> Figure:
    """Best angle against α for several d, and losses by step for one d."""
    figure = canvas(2, width=5.2)
    left, right = figure.subplots(1, 2)
    for (d, by_size), colour, marker in zip(runs.items(), CYCLE, "osD^", strict=False):
        sizes = sorted(by_size)
        best = torch.stack([_stack(by_size[size], "angle_A").amin(0) for size in sizes])
        left.plot(sizes, best.median(-1).values, color=colour, marker=marker, label=f"d = {d}")
        left.fill_between(sizes, best.amin(-1), best.amax(-1), color=colour, alpha=0.18, lw=0)
    left.set_xscale("log")
    left.set_yscale("log")
    left.legend()
    letter(
        left,
        "a  a smaller start aligns better",
        "size α of A at the start",
        "smallest sine of A's angle over t",
    )
    for size, colour in zip(sorted(runs[shown]), _shades(len(runs[shown])), strict=True):
        traces = runs[shown][size]
        _band(right, traces[0].steps, _stack(traces, "loss"), colour, f"α = {size:g}")
    right.set_yscale("log")
    right.set_ylim(bottom=1e-12)
    right.legend(ncols=2, loc="lower left")
    letter(right, f"b  and takes off later (d = {shown})", "step t", "training loss")
    return figure


def _shades(count: int) -> list[tuple[float, ...]]:
    from matplotlib import colormaps

    return [colormaps[SEQUENTIAL](0.9 * i / max(count - 1, 1)) for i in range(count)]


@styled
def race(runs: Mapping[str, Tuned], table: Sequence[Mapping[str, float]]) -> Figure:
    """Loss curves, and angles and error at the start."""
    figure = canvas(2, width=5.6)
    left, right = figure.subplots(1, 2)
    dashes = iter(((0, (1, 1)), (0, (3, 1)), (0, (6, 1)), "-"))
    for label, run in runs.items():
        method = label.split(",")[0]
        line = next(dashes) if method == "LoRA" else "-"
        loss = run.trace["loss"].clamp(min=1e-30)
        left.plot(run.trace.steps, loss, color=_colour(method), ls=line, label=label)
    left.set_yscale("log")
    left.set_ylim(1e-24, 10)
    left.legend(loc="upper right", ncols=1)
    letter(left, "a  loss, each at its best rate", "step t", "training loss")
    shown = [row for row in table if not row["method"].startswith("LoRA, ")]
    shown = [next(row for row in table if row["method"].startswith("LoRA, ")), *shown]
    names = (
        ("angle_A", "A's angle to $U_{r^*}(\\Delta)$", ""),
        ("angle_B", "B's angle to $V_{r^*}(\\Delta)$", "///"),
        ("gap", "$\\|W_0 - W - \\Delta\\|/\\|\\Delta\\|$", "..."),
    )
    for i, (name, label, hatch) in enumerate(names):
        places = [j + (i - 1) * 0.27 for j in range(len(shown))]
        bars = right.bar(
            places,
            [row[name] for row in shown],
            0.25,
            label=label,
            hatch=hatch,
            color=(BLUE, "#9ecae1", "#d9d9d9")[i],
            edgecolor="white",
        )
        right.bar_label(bars, [_short(row[name]) for row in shown], fontsize=8, padding=1)
    right.set_xticks(range(len(shown)), [row["method"].split(",")[0] for row in shown])
    right.set_ylim(0, 1.45)
    right.legend(loc="upper right", ncols=1)
    right.grid(axis="x", visible=False)
    letter(right, "b  before the first step", "", "sine of the angle, relative error")
    return figure


def _short(value: float) -> str:
    return "0" if value < 1e-9 else f"{value:.2f}"


def _colour(method: str) -> str:
    return METHOD_COLOURS[METHOD_OF_LABEL[method]]


@styled
def phase_portrait(portrait: Portrait) -> Figure:
    """The log loss as a surface and as a map with the flow, with all descents on both."""
    figure = canvas(3, width=5.0, height=4.6)
    solid = figure.add_subplot(1, 3, 1, projection="3d")
    flat, curve = figure.add_subplot(1, 3, 2), figure.add_subplot(1, 3, 3)
    floor = 1e-4
    height = (portrait.loss + floor).log10()
    b, a = torch.meshgrid(portrait.b, portrait.a, indexing="ij")
    solid.plot_surface(a, b, height, cmap=SEQUENTIAL, alpha=0.75, lw=0, rcount=80, ccount=80)
    solid.view_init(elev=48, azim=-62)
    solid.set_zlabel("log$_{10}$ loss", labelpad=2)
    solid.tick_params(pad=0, labelsize=8)
    levels = torch.linspace(-4, 1.5, 23).tolist()
    filled = flat.contourf(
        portrait.a, portrait.b, height, levels=levels, cmap=SEQUENTIAL, extend="both"
    )
    figure.colorbar(
        filled, ax=flat, label="log$_{10}$ loss", ticks=[-4, -3, -2, -1, 0, 1], shrink=0.85
    )
    flat.streamplot(
        portrait.a.numpy(),
        portrait.b.numpy(),
        portrait.flow_a.numpy(),
        portrait.flow_b.numpy(),
        color="white",
        linewidth=0.5,
        arrowsize=0.7,
        density=1.1,
    )
    extent = float(portrait.a[-1])
    branch = torch.linspace(portrait.shift / extent, extent, 100)
    for sign in (1, -1):
        flat.plot(sign * branch, sign * portrait.shift / branch, color="white", lw=2.5, ls="--")
    paths = [
        *((path, RED, "LoRA") for path in portrait.random),
        (portrait.spectral, BLACK, "LoRA-One"),
    ]
    for path, colour, _ in paths:
        x, y, z = path.points[:, 0], path.points[:, 2], (path.loss + floor).log10()
        solid.plot(x, y, z + 0.08, color=colour, lw=1.8, zorder=10)
        flat.plot(x, y, color=colour, lw=2)
        flat.plot(x[:1], y[:1], "o", color=colour, ms=7, mec="white")
        flat.plot(x[-1:], y[-1:], "*", color=colour, ms=12, mec="white")
    _paths_by_step(curve, portrait)
    flat.set_aspect("equal")
    flat.set_xlim(-extent, extent)
    flat.set_ylim(-extent, extent)
    flat.grid(visible=False)
    letter(solid, "a  the surface", "$a_1$ (along G)", "b")
    letter(flat, "b  from above", "$a_1$ (along G)", "b")
    letter(curve, "c  the way down", "step t", "training loss")
    return figure


def _paths_by_step(axes: Axes, portrait: Portrait) -> None:
    def draw(path: Path, colour: str, label: str | None) -> None:
        axes.plot(path.loss.clamp(min=1e-12), color=colour, label=label)

    for i, path in enumerate(portrait.random):
        draw(path, RED, None if i else f"random start ({len(portrait.random)} seeds)")
    draw(portrait.spectral, BLACK, "spectral start")
    axes.set_yscale("log")
    axes.set_ylim(1e-10, 3)
    axes.legend()


@styled
def ranks(rows: Sequence[RankRow], true_rank: int) -> Figure:
    """What one step holds of G, and where training ends, against the rank."""
    figure = canvas(2, width=5.4)
    left, right = figure.subplots(1, 2)
    all_ranks = sorted({row.rank for row in rows})
    for method in ("LoRA-GA", "LoRA-One"):
        marker, line = STYLES[method]
        name = {"LoRA-GA": "LoRA-GA's first step", "LoRA-One": "LoRA-One's start"}[method]
        _by_rank(left, rows, method, "first_step", all_ranks, marker, line, name)
    left.set_ylim(0, 1.08)
    left.legend(loc="lower right")
    letter(left, "a  share of the gradient", "rank r", "squared cosine to G")
    for method in ("LoRA", "LoRA-GA", "LoRA-One"):
        marker, line = STYLES[method]
        _by_rank(right, rows, method, "error", all_ranks, marker, line, method)
    floors = [next(row.floor for row in rows if row.rank == rank) for rank in all_ranks]
    right.plot(
        all_ranks,
        [max(f, 1e-17) for f in floors],
        "_",
        color=GREY,
        ms=16,
        mew=2,
        label="best shift of rank r",
    )
    right.set_yscale("log")
    right.set_ylim(1e-17, 8)
    right.legend(loc="lower left")
    letter(
        right,
        "b  where training ends",
        "rank r",
        "$\\|W_T - W - \\Delta\\|_F\\,/\\,\\|\\Delta\\|_F$",
    )
    for axes in (left, right):
        axes.axvline(true_rank, color=GREY, lw=1, ls=":")
        axes.set_xticks(all_ranks)
        axes.text(
            true_rank + 0.12, axes.get_ylim()[1] * 0.98, "r = r*", color=GREY, fontsize=9, va="top"
        )
    return figure


def _by_rank(
    axes: Axes,
    rows: Sequence[RankRow],
    method: str,
    name: str,
    all_ranks: Sequence[int],
    marker: str,
    line: str,
    label: str,
) -> None:
    values = torch.tensor(
        [
            [getattr(r, name) for r in rows if r.rank == rank and r.method == method]
            for rank in all_ranks
        ],
        dtype=torch.float64,
    ).clamp(min=ROUNDING)
    colour = _colour(method)
    axes.plot(
        all_ranks, values.median(-1).values, color=colour, marker=marker, ls=line, label=label
    )
    axes.fill_between(all_ranks, values.amin(-1), values.amax(-1), color=colour, alpha=0.15, lw=0)


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
        "a  error from the spectral start",
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
    letter(second, "b  steps to $10^{-6}$", "condition number κ(Δ)", "steps")
    letter(third, "c  the same, damped", "condition number κ(Δ)", "steps")
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
    """Errors after a fixed number of AdamW steps against κ."""
    figure = canvas(1, width=6.4)
    axes = figure.subplots()
    for start, line in (("spectral", "-"), ("random", ":")):
        for label, colour, marker in (("AdamW", BLACK, "o"), ("preconditioned AdamW", BLUE, "s")):
            chosen = [r for r in rows if r.start == start and r.label == label]
            x = sorted({r.condition for r in chosen})
            y = torch.tensor([[r.error for r in chosen if r.condition == c] for c in x])
            axes.plot(
                x,
                y.median(-1).values,
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
        letter(axes, f"{name}  κ = {result.condition:g}", "step t", "")
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
        ("left", "a  input side, $U_{r^*}$"),
        ("right", "b  output side, $V_{r^*}$"),
        ("gap", "c  error of the start, best γ"),
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
        _band(left, torch.arange(len(losses)), losses, _colour(label), name, line)
    left.set_yscale("log")
    left.legend()
    letter(left, "a  fine-tuning on even digits", "step t", "training loss")
    height = plane.loss.log10()
    filled = right.contourf(plane.x, plane.y, height, levels=20, cmap="Greys", alpha=0.8)
    figure.colorbar(filled, ax=right, label="log$_{10}$ loss", shrink=0.9)
    for label, marker in (("full", "o"), ("LoRA", "s"), ("LoRA-One", "D")):
        path = plane.paths[label]
        right.plot(path[:, 0], path[:, 1], color=_colour(label), marker=marker, ms=3.5, lw=1.5)
        right.plot(path[-1:, 0], path[-1:, 1], "*", color=_colour(label), ms=16, mec="white")
    right.grid(visible=False)
    letter(
        right,
        f"b  the paths in a plane ({plane.share:.0%} of them)",
        "first direction",
        "second direction",
    )
    return figure


@styled
def language_angles(runs: Mapping[str, TrainedRun]) -> Figure:
    """Mean sines of the angles to the one-step gradient's spaces, by kind of layer."""
    figure = canvas(len(runs), 2, width=4.6, height=3.4)
    panels = figure.subplots(2, len(runs), sharex="col", sharey=True, squeeze=False)
    for column, (label, run) in enumerate(runs.items()):
        for row, name in enumerate("AB"):
            axes = panels[row, column]
            for i, (kind, series) in enumerate(by_kind(run.angles, name).items()):
                axes.plot(
                    list(series),
                    list(series.values()),
                    color=CYCLE[i],
                    marker="osD^vPX"[i],
                    ms=5,
                    lw=1.6,
                    label=kind,
                )
            axes.set_xscale("symlog", linthresh=1)
            axes.set_ylim(0, 1.05)
            axes.set_title(f"{label}: {name}")
    for axes in panels[-1]:
        axes.set_xlabel("training step (0, then logarithmic)")
    for axes in panels[:, 0]:
        axes.set_ylabel("mean sine of the angles to G")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    return figure


@styled
def one_step(result: OneStepLosses, trained: Mapping[int, float], shown: Sequence[int]) -> Figure:
    """Validation loss after one step against its size, beside trained LoRA's."""
    figure = canvas(1, width=7.2, height=4.2)
    axes = figure.subplots()
    for (label, losses), colour, marker in zip(
        result.losses.items(), (RED, BLUE, GREEN), "osD", strict=True
    ):
        axes.plot(
            list(losses),
            list(losses.values()),
            color=colour,
            marker=marker,
            label=f"one step, {label}",
        )
    axes.axhline(result.base, color=BLACK, lw=1.2, label="base model")
    for step, shade in zip(shown, ("-.", "--", ":"), strict=False):
        axes.axhline(trained[step], color=GREY, lw=1.2, ls=shade, label=f"LoRA, {step} steps")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.6 * result.base)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    letter(
        axes, "one step without training", "size η of the step", "validation loss (nats per token)"
    )
    return figure

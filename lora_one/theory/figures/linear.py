"""Pictures of experiments 1 to 3."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_one.plot_style import BLUE, CYCLE, GREY, ORANGE, RED, SEQUENTIAL, canvas, letter, styled
from lora_one.theory.alignment import fit_log
from lora_one.theory.descent import Trace
from lora_one.theory.figures.common import (
    ROUNDING,
    STYLES,
    band,
    colour_of,
    number_ticks,
    power,
    shades,
    stack,
)
from lora_one.theory.linear import AlignmentTime, RankRow, Tuned
from lora_one.theory.portrait import Path, Portrait


@styled
def alignment(traces: Sequence[Trace], theta: float, times: Sequence[AlignmentTime]) -> Figure:
    """Angles of A_t and B_t by step, and t* against d."""
    figure = canvas(2, width=5.2)
    left, right = figure.subplots(1, 2)
    steps = traces[0].steps
    band(left, steps[1:], stack(traces, "angle_B")[1:], RED, "$B_t$ to $V_{r^*}(G)$")
    band(left, steps, stack(traces, "angle_A"), BLUE, "$A_t$ to $U_{r^*}(G)$", "--")
    left.axhline(theta, color=GREY, lw=1, ls=":")
    left.set_yscale("log")
    left.set_ylim(1e-17, 5)
    left.legend(loc="center right")
    letter(left, "(a) B is aligned after one step, A soon", "step t", "sine of the largest angle")
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
    number_ticks(right.xaxis, sorted({row.d for row in times}))
    right.legend(loc="upper left", title="95 % interval of the slope; theorem: 0.50")
    low, high = right.get_ylim()
    right.set_ylim(low, high + 0.25 * (high - low))
    letter(
        right,
        "(b) alignment time grows like ½ ln d",
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
        best = torch.stack([stack(by_size[size], "angle_A").amin(0) for size in sizes])
        left.plot(sizes, best.median(-1).values, color=colour, marker=marker, label=f"d = {d}")
        left.fill_between(sizes, best.amin(-1), best.amax(-1), color=colour, alpha=0.18, lw=0)
    left.set_xscale("log")
    left.set_yscale("log")
    left.legend()
    letter(
        left,
        "(a) smaller starts align better",
        "size α of A at the start",
        "smallest sine of A's angle over t",
    )
    for size, colour in zip(sorted(runs[shown]), shades(len(runs[shown])), strict=True):
        traces = runs[shown][size]
        band(right, traces[0].steps, stack(traces, "loss"), colour, f"α = {power(size)}")
    right.set_yscale("log")
    right.set_ylim(bottom=1e-12)
    right.legend(ncols=2, loc="lower left")
    letter(right, f"(b) and take off later (d = {shown})", "step t", "training loss")
    return figure


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
        left.plot(run.trace.steps, loss, color=colour_of(method), ls=line, label=label)
    left.set_yscale("log")
    left.set_ylim(1e-24, 10)
    left.legend(loc="lower left")
    letter(left, "(a) loss, each at its best rate", "step t", "training loss")
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
    letter(right, "(b) before the first step", "", "sine of the angle, relative error")
    return figure


def _short(value: float) -> str:
    return "0" if value < 1e-9 else f"{value:.2f}"


@styled
def phase_portrait(portrait: Portrait) -> Figure:
    """The log loss as a surface and as a map with the flow, with all descents on both."""
    figure = canvas(3, width=5.0, height=4.6)
    solid = figure.add_subplot(1, 3, 1, projection="3d")
    flat, curve = figure.add_subplot(1, 3, 2), figure.add_subplot(1, 3, 3)
    floor = 1e-3
    height = (portrait.loss + floor).log10()
    b, a = torch.meshgrid(portrait.b, portrait.a, indexing="ij")
    solid.plot_surface(
        a, b, height, cmap=SEQUENTIAL, alpha=0.75, lw=0, rcount=90, ccount=90, rasterized=True
    )
    solid.view_init(elev=48, azim=-62)
    solid.set_zlabel("log$_{10}$ loss", labelpad=2)
    solid.tick_params(pad=0, labelsize=8)
    levels = torch.linspace(-3, 1.5, 19).tolist()
    filled = flat.contourf(
        portrait.a, portrait.b, height, levels=levels, cmap=SEQUENTIAL, extend="both"
    )
    figure.colorbar(filled, ax=flat, label="log$_{10}$ loss", ticks=[-3, -2, -1, 0, 1], shrink=0.85)
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
    outline = [patheffects.withStroke(linewidth=3.5, foreground="white")]
    paths = [(path, colour_of("LoRA")) for path in portrait.random]
    for path, colour in [*paths, (portrait.spectral, colour_of("LoRA-One"))]:
        x, y, z = path.points[:, 0], path.points[:, 2], (path.loss + floor).log10()
        solid.plot(x, y, z + 0.08, color=colour, lw=1.8, zorder=10, path_effects=outline)
        flat.plot(x, y, color=colour, lw=2, path_effects=outline)
        flat.plot(x[:1], y[:1], "o", color=colour, ms=8, mec="white")
        flat.plot(x[-1:], y[-1:], "*", color=colour, ms=14, mec="white")
    _paths_by_step(curve, portrait)
    flat.set_aspect("equal")
    flat.set_xlim(-extent, extent)
    flat.set_ylim(-extent, extent)
    flat.grid(visible=False)
    letter(solid, "(a) the surface", "$a_1$ (along G)", "b")
    letter(flat, "(b) from above", "$a_1$ (along G)", "b")
    letter(curve, "(c) the way down", "step t", "training loss")
    return figure


def _paths_by_step(axes: Axes, portrait: Portrait) -> None:
    def draw(path: Path, colour: str, label: str | None) -> None:
        axes.plot(path.loss.clamp(min=1e-12), color=colour, label=label)

    for i, path in enumerate(portrait.random):
        draw(path, colour_of("LoRA"), None if i else f"random start ({len(portrait.random)} seeds)")
    draw(portrait.spectral, colour_of("LoRA-One"), "spectral start")
    axes.set_yscale("log")
    axes.set_ylim(1e-10, 3)
    axes.legend()


@styled
def ranks(rows: Sequence[RankRow], true_rank: int) -> Figure:
    """What one step holds of G, where B points, and where training ends, against the rank."""
    figure = canvas(2, 2, width=5.4, height=3.5)
    (first, second), (third, fourth) = figure.subplots(2, 2)
    all_ranks = sorted({row.rank for row in rows})
    _by_rank(first, rows, "LoRA-GA", "first_step", "LoRA-GA's first step")
    _by_rank(first, rows, "LoRA-One", "first_step", "LoRA-One's start")
    letter(first, "(a) share of the gradient", "", "squared cosine to G")
    _by_rank(second, rows, "LoRA-GA", "start_angle", "LoRA-GA")
    _by_rank(second, rows, "LoRA-One", "start_angle", "LoRA-One")
    letter(second, "(b) B at the start", "", "sine of B's angle to $V_{r^*}(\\Delta)$")
    floors = {row.rank: row.floor for row in rows}
    error = "$\\|W_T - W - \\Delta\\|_F\\,/\\,\\|\\Delta\\|_F$"
    for axes, title in ((third, "(c) where training ends"), (fourth, "(d) the same, logarithmic")):
        for method in ("LoRA", "LoRA-GA", "LoRA-One"):
            _by_rank(axes, rows, method, "error", method)
        drawn = [rank for rank in all_ranks if floors[rank] > 0 or axes is third]
        best = [floors[rank] for rank in drawn]
        axes.plot(drawn, best, "_", color=RED, ms=18, mew=2, label="best shift of rank r")
        letter(axes, title, "rank r", error)
    fourth.set_yscale("log")
    limits = ((0, 1.12), (-0.05, 1.12), (-0.03, 0.9), (1e-17, 1e2))
    for axes, limit in zip((first, second, third, fourth), limits, strict=True):
        axes.set_ylim(limit)
        axes.axvline(true_rank, color=GREY, lw=1, ls=":")
        axes.set_xticks(all_ranks)
        place = {"va": "top", "fontsize": 9, "transform": axes.get_xaxis_transform()}
        axes.text(true_rank + 0.15, 0.99, "r = r*", color=GREY, **place)
    first.legend(loc="lower right")
    second.legend(loc="center right")
    third.legend(loc="upper right", bbox_to_anchor=(1, 0.95))
    return figure


def _by_rank(axes: Axes, rows: Sequence[RankRow], method: str, name: str, label: str) -> None:
    all_ranks = sorted({row.rank for row in rows})
    chosen = [[r for r in rows if r.rank == rank and r.method == method] for rank in all_ranks]
    values = torch.tensor([[getattr(row, name) for row in group] for group in chosen])
    values = values.double().clamp(min=ROUNDING)
    colour, (marker, line) = colour_of(method), STYLES[method]
    axes.plot(
        all_ranks, values.median(-1).values, color=colour, marker=marker, ls=line, label=label
    )
    axes.fill_between(all_ranks, values.amin(-1), values.amax(-1), color=colour, alpha=0.15, lw=0)

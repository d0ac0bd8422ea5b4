"""Pictures of experiment 6."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from lora_one.plot_style import BLACK, BLUE, CYCLE, GREEN, GREY, RED, canvas, letter, styled
from lora_one.theory.language import OneStepLosses, TrainedRun, by_kind


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
        axes.axhline(trained[step], color=GREY, lw=1.2, ls=shade, label=f"LoRA at step {step}")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.6 * result.base)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    letter(
        axes, "one step without training", "size η of the step", "validation loss (nats per token)"
    )
    return figure

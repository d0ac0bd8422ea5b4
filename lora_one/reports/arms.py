"""One method with one optimiser: what was tried, and what was chosen.

An *arm* is a method with an optimiser (and any other setting that varies and is not tuned); its
settings are the points of its grid. One point is chosen by the lowest mean validation loss, so
that the test metric chooses nothing; only where validation losses are missing does the metric
itself choose, and then it is said.

Where an arm has *trials*, runs that asked no test row, they are its grid, and its other runs at the
chosen setting are its result.

A setting at which training diverged was tried and has lost. Its runs are in no mean.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_one.harness.sweeps.tuning import TUNED
from lora_one.reports.groups import Group, as_text, without_seeds
from lora_one.reports.records import Run
from lora_one.reports.statistics import mean_of

Settings = dict[str, Any]
Lost = Mapping[str, Sequence[Run]]
"""Runs that diverged, by ``untuned``."""
LEARNING_RATE = TUNED["learning_rate"]
# What a method or an optimiser is tuned over; everything else that varies makes another arm.
TUNED_KEYS = tuple(TUNED.values())


@dataclass(frozen=True)
class Arm:
    """One method with one optimiser, and the point of its grid that was chosen.

    Attributes:
        name: Short, unique in its block.
        groups: All of its runs, at least one group.
        tried: The points of its grid, trials where it has any.
        diverged: How many further settings were tried, and all their runs diverged.
        chosen: What represents the arm: the best point of the grid, of trials its final runs.
        chosen_by: ``validation loss``, or the metric's name where there was no such loss.
        grid: Tuned setting -> the values that were tried: numbers in order, then ``auto``.
        at_edge: Tuned settings whose chosen value is the smallest or the largest tried.
    """

    name: str
    groups: tuple[Group, ...]
    tried: tuple[Group, ...]
    diverged: int
    chosen: Group
    chosen_by: str
    grid: dict[str, list[Any]]
    at_edge: tuple[str, ...]

    @property
    def budget(self) -> int:
        """How many settings were tried."""
        return len(self.tried) + self.diverged

    @property
    def runs(self) -> int:
        """Finished runs that went into the arm, all points and seeds."""
        return sum(len(group.runs) for group in self.groups)

    @property
    def seconds(self) -> float:
        """What start and training of all these runs cost together: tuning included."""
        return sum(
            init + train
            for group in self.groups
            for init, train in zip(group.init_seconds, group.train_seconds, strict=True)
        )


def higher_is_better(metric: str) -> bool:
    """Losses and perplexities are to be low, every other metric high."""
    return "loss" not in metric and "perplexity" not in metric


def untuned(settings: Settings) -> str:
    """Return all that is neither a seed nor tuned; equal for runs of one arm."""
    return as_text(without_seeds(settings, TUNED_KEYS))


def by_arm(diverged: Sequence[Run]) -> Lost:
    """Sort runs that diverged, so that each arm finds its own without looking at all."""
    lost: dict[str, list[Run]] = {}
    for run in diverged:
        lost.setdefault(untuned(run.settings), []).append(run)
    return lost


def choose(name: str, groups: Sequence[Group], lost: Lost, metric: str) -> Arm:
    """Choose what represents an arm.

    Args:
        name: Of the arm.
        groups: All of its runs, at least one group.
        lost: Runs of any arm that ended because a number was not finite.
        metric: What chooses where there is no validation loss.
    """
    tried = [group for group in groups if group.is_trial] or groups
    losses = [mean_of(group.validation_losses) for group in tried]
    scores = [mean_of(group.values(metric)) for group in tried]
    places = range(len(tried))
    if None not in losses:
        # Of equal ones the smallest, as the search decides.
        chosen = min(places, key=lambda place: (losses[place], _point(tried[place].settings)))
        by = "validation loss"
    elif None not in scores:
        pick = max if higher_is_better(metric) else min
        chosen, by = pick(places, key=lambda place: scores[place]), metric
    else:
        chosen, by = 0, "order"
    best = tried[chosen]
    trained = [group.settings for group in tried if group.is_trained]
    diverged = _lost_settings(trained, lost)
    grid: dict[str, list[Any]] = {}
    for key in TUNED_KEYS:
        values = {settings.get(key) for settings in [*trained, *diverged]} - {None}
        if values:
            grid[key] = [*_numbers(values), *sorted(v for v in values if isinstance(v, str))]
    at_edge = tuple(
        key
        for key, values in grid.items()
        if len(numbers := _numbers(values)) > 1
        and best.settings.get(key) in (numbers[0], numbers[-1])
    )
    result = _result(best, groups)
    return Arm(name, tuple(groups), tuple(tried), len(diverged), result, by, grid, at_edge)


def _lost_settings(tried: Sequence[Settings], lost: Lost) -> list[Settings]:
    """Return what else an arm tried: each setting of which no run came to its end."""
    own = [run.settings for key in {untuned(one) for one in tried} for run in lost.get(key, ())]
    points = {as_text(without_seeds(one)): one for one in own}
    ended = {as_text(without_seeds(one)) for one in tried}
    return [settings for point, settings in points.items() if point not in ended]


def _point(settings: Settings) -> list[float]:
    """Return where a setting lies in the grid; behind all numbers where it has none."""
    return [
        value if isinstance(value := settings.get(key), int | float) else math.inf
        for key in TUNED_KEYS
    ]


def _numbers(values: Iterable[Any]) -> list[float]:
    return sorted(value for value in values if isinstance(value, int | float))


def _result(best: Group, groups: Sequence[Group]) -> Group:
    """Return the final runs at a trial's setting, if there are any; else the group itself."""
    if not best.is_trial:
        return best
    setting = [best.settings.get(key) for key in TUNED_KEYS]
    finals = [
        group
        for group in groups
        if not group.is_trial and [group.settings.get(key) for key in TUNED_KEYS] == setting
    ]
    return finals[0] if finals else best

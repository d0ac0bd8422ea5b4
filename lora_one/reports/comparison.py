"""Methods side by side: what was tried, what was chosen, which differences are real.

A *block* holds what can be compared: the same test rows, model and metric. In a block, an *arm* is
a method with an optimiser (and any other setting that varies and is not tuned); its settings are
the points of its grid. Per arm one point is chosen by the lowest mean validation loss, so that the
test metric chooses nothing; only where validation losses are missing does the metric itself
choose, and then it is said.

Where an arm has *trials*, runs that asked no test row, they are its grid, and its other runs at the
chosen setting are its result.

A setting at which training diverged was tried and has lost. Its runs are in no mean.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_one.harness.sweeps.tuning import TUNED
from lora_one.reports.figure import slug
from lora_one.reports.groups import (
    FOLLOWS_METHOD,
    FOLLOWS_OPTIMISER,
    Group,
    as_text,
    test_row_ids,
    varied_settings,
    without_seeds,
)
from lora_one.reports.records import Run
from lora_one.reports.statistics import Difference, mean, paired_difference, verdict

Settings = dict[str, Any]
LEARNING_RATE = TUNED["learning_rate"]
# What a method or an optimiser is tuned over; everything else that varies makes another arm.
TUNED_KEYS = tuple(TUNED.values())
# Where a record says on what machine and by what code it was made.
ORIGINS = (
    ("processor", ("hardware", "processor")),
    ("GPUs", ("hardware", "gpus")),
    ("threads", ("hardware", "threads")),
    ("commit", ("git", "commit")),
    ("torch", ("versions", "torch")),
    ("transformers", ("versions", "transformers")),
)


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


@dataclass(frozen=True)
class Row:
    """An arm in its block's comparison.

    Attributes:
        arm: Which.
        is_best: Whether its mean is the best of the block.
        difference: To the best arm, over common seeds; None for the best itself.
        verdict: The difference in words.
    """

    arm: Arm
    is_best: bool
    difference: Difference | None
    verdict: str

    @property
    def is_tie(self) -> bool:
        """Whether the difference to the best was judged and cannot be told from noise."""
        return self.difference is not None and self.difference.is_real is False


@dataclass(frozen=True)
class Block:
    """What can be compared.

    Attributes:
        title: Dataset, model and metric; no two blocks have the same.
        metric: The primary metric of the dataset.
        groups: All settings.
        rows: One per arm, the best first.
        warnings: Unequal budgets, rates at the edge of a grid, points chosen on test rows.
    """

    title: str
    metric: str
    groups: tuple[Group, ...]
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger metric is the better one."""
        return higher_is_better(self.metric)


def higher_is_better(metric: str) -> bool:
    """Losses and perplexities are to be low, every other metric high."""
    return "loss" not in metric and "perplexity" not in metric


def compare(groups: Sequence[Group], diverged: Sequence[Run] = ()) -> list[Block]:
    """Sort groups into blocks and judge each block's arms against its best one.

    Args:
        groups: Finished runs.
        diverged: Runs that ended because a number was not finite, see ``groups.diverged_runs``.
    """
    blocks: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        if not group.is_trial:
            blocks.setdefault((_subject(group), group.primary_metric), []).append(group)
    subjects = {subject for subject, _ in blocks}
    for group in groups:
        if group.is_trial and _subject(group) not in subjects:
            blocks.setdefault((_subject(group), group.primary_metric), [])
    for (subject, _), members in blocks.items():
        members += [group for group in groups if group.is_trial and _subject(group) == subject]
    return _told_apart([_block(members, diverged) for members in blocks.values()])


def _subject(group: Group) -> str:
    """What runs must share to be compared by a metric."""
    return as_text(_subject_facts(group))


def _subject_facts(group: Group) -> dict[str, str]:
    facts = ("dataset.name", "dataset.test_rows", "model.name", "dataset.path")
    known = {fact: str(group.settings.get(fact)) for fact in facts}
    return known | {"test rows": str(test_row_ids(group.runs[0]))}


def _told_apart(blocks: list[Block]) -> list[Block]:
    """Add facts to titles until none is that of two blocks; titles name files as well."""
    for fact in _subject_facts(blocks[0].groups[0]) if blocks else ():
        own = [_subject_facts(block.groups[0])[fact] for block in blocks]
        values: dict[str, set[str]] = {}
        for block, value in zip(blocks, own, strict=True):
            values.setdefault(slug(block.title), set()).add(value)
        blocks = [
            replace(block, title=f"{block.title} · {fact.rpartition('.')[2]} {value}")
            if len(values[slug(block.title)]) > 1
            else block
            for block, value in zip(blocks, own, strict=True)
        ]
    return blocks


def _block(groups: list[Group], diverged: Sequence[Run]) -> Block:
    metric = groups[0].primary_metric  # the first is a trial only where all are
    distinguishing = [key for key in varied_settings(groups) if key not in TUNED_KEYS]
    plain = {key: _plain_values(groups, key) for key in distinguishing}
    arms: dict[str, list[Group]] = {}
    for group in groups:
        arms.setdefault(_arm_name(group, plain), []).append(group)
    chosen = [_choose(name, members, diverged, metric) for name, members in arms.items()]
    settings = groups[0].settings
    model = str(settings.get("model.name", "model")).rstrip("/").split("/")[-1]
    return Block(
        title=f"{settings.get('dataset.name', 'dataset')} · {model} · {metric}",
        metric=metric,
        groups=tuple(groups),
        rows=_judge(chosen, metric),
        warnings=(
            *_warnings(chosen, metric),
            *_lost_seeds(chosen, diverged),
            *_mixed_origins(chosen),
        ),
    )


def _plain_values(groups: Sequence[Group], key: str) -> dict[tuple[str, str], str]:
    """Find out who need not say a setting that makes arms.

    Returns:
        Method and optimiser -> their only value, where most of the block has the same one.
    """
    values = Counter(as_text(group.settings.get(key)) for group in groups)
    usual, count = values.most_common(1)[0]
    own: dict[tuple[str, str], set[str]] = {}
    for group in groups:
        own.setdefault((group.method, group.optimiser), set()).add(as_text(group.settings.get(key)))
    is_usual = 2 * count > len(groups)
    return {who: usual for who, had in own.items() if is_usual and had == {usual}}


def _arm_name(group: Group, plain: Mapping[str, Mapping[tuple[str, str], str]]) -> str:
    settings, who = group.settings, (group.method, group.optimiser)
    extra = []
    for key, silent in plain.items():
        # What belongs to a method or optimiser is no distinction between methods.
        if key in FOLLOWS_METHOD + FOLLOWS_OPTIMISER and settings.get(key) is None:
            continue
        if who not in silent:
            extra.append(f"{key.rpartition('.')[2]}={settings.get(key)}")
    return " · ".join([*who, *extra])


def _choose(name: str, groups: list[Group], diverged: Sequence[Run], metric: str) -> Arm:
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
    lost = _lost_settings(trained, diverged)
    grid: dict[str, list[Any]] = {}
    for key in TUNED_KEYS:
        values = {settings.get(key) for settings in [*trained, *lost]} - {None}
        if values:
            grid[key] = [*_numbers(values), *sorted(v for v in values if isinstance(v, str))]
    at_edge = tuple(
        key
        for key, values in grid.items()
        if len(numbers := _numbers(values)) > 1
        and best.settings.get(key) in (numbers[0], numbers[-1])
    )
    result = _result(best, groups)
    return Arm(name, tuple(groups), tuple(tried), len(lost), result, by, grid, at_edge)


def _lost_settings(tried: Sequence[Settings], diverged: Sequence[Run]) -> list[Settings]:
    """Return what else an arm tried: each setting of which no run came to its end."""
    untuned = {as_text(without_seeds(one, TUNED_KEYS)) for one in tried}
    points = {as_text(without_seeds(one)) for one in tried}
    lost: dict[str, Settings] = {}
    for run in diverged:
        point = as_text(without_seeds(run.settings))
        if as_text(without_seeds(run.settings, TUNED_KEYS)) in untuned and point not in points:
            lost.setdefault(point, run.settings)
    return list(lost.values())


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


def _judge(arms: list[Arm], metric: str) -> tuple[Row, ...]:
    higher = higher_is_better(metric)
    scored = {arm.name: mean_of(arm.chosen.values(metric)) for arm in arms}
    ranked = sorted(arms, key=lambda arm: _rank(scored[arm.name], higher))
    best = ranked[0]
    rows = []
    for arm in ranked:
        if scored[arm.name] is None:
            rows.append(Row(arm, False, None, f"not judged: {metric} is missing"))
        elif arm is best:
            rows.append(Row(arm, len(arms) > 1, None, "best" if len(arms) > 1 else "alone"))
        else:
            ours, theirs = arm.chosen.by_seed(metric), best.chosen.by_seed(metric)
            difference = paired_difference(ours, theirs)
            words = verdict(difference, higher_is_better=higher)
            rows.append(Row(arm, False, difference, words))
    return tuple(rows)


def _rank(score: float | None, higher: bool) -> tuple[bool, float]:
    if score is None:
        return True, 0.0
    return False, -score if higher else score


def _warnings(arms: list[Arm], metric: str) -> list[str]:
    warnings = []
    tried = {arm.name: arm.budget for arm in arms if arm.chosen.is_trained}
    if len(set(tried.values())) > 1:
        counts = ", ".join(f"{name}: {count}" for name, count in tried.items())
        warnings.append(
            f"unequal tuning budgets (settings that were trained to the end or diverged): {counts}"
        )
    edges = [
        f"{arm.name} ({key.rpartition('.')[2]} {arm.chosen.settings[key]:g})"
        for arm in arms
        for key in arm.at_edge
    ]
    if edges:
        warnings.append(
            "chosen at the edge of the grid that was tried, so that a better one may lie outside: "
            + ", ".join(edges)
        )
    flattered = [arm.name for arm in arms if len(arm.tried) > 1 and arm.chosen_by == metric]
    if flattered:
        warnings.append(
            f"chosen by {metric} on the test rows themselves, which flatters (there is no "
            f"validation loss): {', '.join(flattered)}"
        )
    # The loss of test rows leaves out those that are longer than model.max_length.
    rows = {arm.name: arm.chosen.test_rows for arm in arms if arm.chosen.test_rows is not None}
    if len(set(rows.values())) > 1:
        counts = ", ".join(f"{name}: {count}" for name, count in rows.items())
        warnings.append(f"{metric} was not taken over the same test rows: {counts}")
    # Of untrained runs that gave the same replies one seed is left.
    seeds = {arm.name: arm.chosen.by_seed(metric).keys() for arm in arms if arm.chosen.is_trained}
    seeds = {name: known for name, known in seeds.items() if known}
    if len(set(map(frozenset, seeds.values()))) > 1:
        counts = ", ".join(f"{name}: {len(known)}" for name, known in seeds.items())
        warnings.append(
            f"means over different seeds ({counts}), which a difference is not: it is taken over "
            "the seeds that both have"
        )
    if len(arms) > 2:
        warnings.append(
            f"the best of {len(arms)} rows is partly the luckiest: its lead over the others is "
            "more likely too large than too small"
        )
    return warnings


def _lost_seeds(arms: Sequence[Arm], diverged: Sequence[Run]) -> list[str]:
    """Warn of means over those seeds only with which a setting did not diverge."""
    lost = Counter(as_text(without_seeds(run.settings)) for run in diverged)
    counts = {arm.name: lost[as_text(without_seeds(arm.chosen.settings))] for arm in arms}
    words = ", ".join(f"{name}: {count}" for name, count in counts.items() if count)
    return [f"runs at the chosen setting that diverged and are in no mean: {words}"] * bool(words)


def _mixed_origins(arms: Sequence[Arm]) -> list[str]:
    """Warn of rows that other machines or other code have made than the rest."""
    runs = [run for arm in arms for run in arm.chosen.runs]
    counts = {name: len({as_text(_origin(run, path)) for run in runs}) for name, path in ORIGINS}
    words = ", ".join(f"{name} ({count})" for name, count in counts.items() if count > 1)
    return [
        f"the runs differ in more than their settings: {words}. Seconds and memory do not compare, "
        "and other rounding moves a metric"
    ] * bool(words)


def _origin(run: Run, path: Sequence[str]) -> Any:
    found = run.record.get("provenance")
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean; None where a value is missing."""
    return None if any(value is None for value in values) else mean(values)

"""Methods side by side: which differences are real.

A *block* holds what can be compared: the same test rows, model and metric. Its arms, each at the
setting that was chosen for it (``arms``), are judged against the best of them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lora_one.reports.arms import TUNED_KEYS, Arm, Lost, by_arm, choose, higher_is_better
from lora_one.reports.caveats import caveats
from lora_one.reports.figure import slug
from lora_one.reports.groups import (
    FOLLOWS_METHOD,
    FOLLOWS_OPTIMISER,
    Group,
    as_text,
    test_row_ids,
    varied_settings,
)
from lora_one.reports.records import Run
from lora_one.reports.statistics import Difference, mean_of, paired_difference, verdict


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
        warnings: What a reader of the rows should know, see ``caveats``.
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
    lost = by_arm(diverged)
    return _told_apart([_block(members, lost) for members in blocks.values()])


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


def _block(groups: list[Group], lost: Lost) -> Block:
    metric = groups[0].primary_metric  # the first is a trial only where all are
    distinguishing = [key for key in varied_settings(groups) if key not in TUNED_KEYS]
    plain = {key: _plain_values(groups, key) for key in distinguishing}
    arms: dict[str, list[Group]] = {}
    for group in groups:
        arms.setdefault(_arm_name(group, plain), []).append(group)
    chosen = [choose(name, members, lost, metric) for name, members in arms.items()]
    settings = groups[0].settings
    model = str(settings.get("model.name", "model")).rstrip("/").split("/")[-1]
    return Block(
        title=f"{settings.get('dataset.name', 'dataset')} · {model} · {metric}",
        metric=metric,
        groups=tuple(groups),
        rows=_judge(chosen, metric),
        warnings=caveats(chosen, metric, lost),
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

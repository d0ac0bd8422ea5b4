"""What a reader of a comparison should know before believing its differences."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_one.reports.arms import Arm, Lost, untuned
from lora_one.reports.groups import as_text, without_seeds
from lora_one.reports.records import Run

# Where a record says on what machine and by what code it was made.
ORIGINS = (
    ("processor", ("hardware", "processor")),
    ("GPUs", ("hardware", "gpus")),
    ("threads", ("hardware", "threads")),
    ("commit", ("git", "commit")),
    ("torch", ("versions", "torch")),
    ("transformers", ("versions", "transformers")),
)


def caveats(arms: Sequence[Arm], metric: str, lost: Lost) -> tuple[str, ...]:
    """Return the warnings that a block's rows need.

    Args:
        arms: Of the block.
        metric: By which they are judged.
        lost: Runs that ended because a number was not finite.
    """
    found = (
        _unequal_budgets(arms),
        _edges(arms),
        _chosen_on_test_rows(arms, metric),
        _other_rows(arms, metric),
        _other_seeds(arms, metric),
        _luck(arms),
        _lost_seeds(arms, lost),
        _mixed_origins(arms),
    )
    return tuple(warning for warning in found if warning is not None)


def _unequal_budgets(arms: Sequence[Arm]) -> str | None:
    tried = {arm.name: arm.budget for arm in arms if arm.chosen.is_trained}
    if len(set(tried.values())) < 2:
        return None
    return "unequal tuning budgets (settings that were trained to the end or diverged): " + _counts(
        tried
    )


def _edges(arms: Sequence[Arm]) -> str | None:
    edges = [
        f"{arm.name} ({key.rpartition('.')[2]} {arm.chosen.settings[key]:g})"
        for arm in arms
        for key in arm.at_edge
    ]
    if not edges:
        return None
    return (
        "chosen at the edge of the grid that was tried, so that a better one may lie outside: "
        + ", ".join(edges)
    )


def _chosen_on_test_rows(arms: Sequence[Arm], metric: str) -> str | None:
    flattered = [arm.name for arm in arms if len(arm.tried) > 1 and arm.chosen_by == metric]
    if not flattered:
        return None
    return (
        f"chosen by {metric} on the test rows themselves, which flatters (there is no "
        f"validation loss): {', '.join(flattered)}"
    )


def _other_rows(arms: Sequence[Arm], metric: str) -> str | None:
    """Warn of a loss that leaves out the rows longer than each ``model.max_length``."""
    rows = {arm.name: arm.chosen.test_rows for arm in arms if arm.chosen.test_rows is not None}
    if len(set(rows.values())) < 2:
        return None
    return f"{metric} was not taken over the same test rows: {_counts(rows)}"


def _other_seeds(arms: Sequence[Arm], metric: str) -> str | None:
    # Of untrained runs that gave the same replies one seed is left.
    seeds = {arm.name: arm.chosen.by_seed(metric).keys() for arm in arms if arm.chosen.is_trained}
    seeds = {name: known for name, known in seeds.items() if known}
    if len(set(map(frozenset, seeds.values()))) < 2:
        return None
    counts = _counts({name: len(known) for name, known in seeds.items()})
    return (
        f"means over different seeds ({counts}), which a difference is not: it is taken over the "
        "seeds that both have"
    )


def _luck(arms: Sequence[Arm]) -> str | None:
    if len(arms) < 3:
        return None
    return (
        f"the best of {len(arms)} rows is partly the luckiest: its lead over the others is more "
        "likely too large than too small"
    )


def _lost_seeds(arms: Sequence[Arm], lost: Lost) -> str | None:
    """Warn of means over those seeds only with which a setting did not diverge."""
    counts = {}
    for arm in arms:
        chosen = without_seeds(arm.chosen.settings)
        own = lost.get(untuned(arm.chosen.settings), ())
        if count := sum(without_seeds(run.settings) == chosen for run in own):
            counts[arm.name] = count
    if not counts:
        return None
    return f"runs at the chosen setting that diverged and are in no mean: {_counts(counts)}"


def _mixed_origins(arms: Sequence[Arm]) -> str | None:
    """Warn of rows that other machines or other code have made than the rest."""
    runs = [run for arm in arms for run in arm.chosen.runs]
    counts = {name: len({as_text(_origin(run, path)) for run in runs}) for name, path in ORIGINS}
    words = ", ".join(f"{name} ({count})" for name, count in counts.items() if count > 1)
    if not words:
        return None
    return (
        f"the runs differ in more than their settings: {words}. Seconds and memory do not compare, "
        "and other rounding moves a metric"
    )


def _origin(run: Run, path: Sequence[str]) -> Any:
    found = run.record.get("provenance")
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items())

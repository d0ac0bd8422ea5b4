"""Runs that differ in nothing but their seed are one group: a row of a table."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from lora_one.errors import NonFiniteError
from lora_one.reports.records import Run, is_trained

SEEDS = ("seed", "dataset.seed", "init.seed", "model.seed", "evaluation.seed")

# Settings that the fixed columns already show, or that follow from the choice of a method.
SHOWN = {
    "train",
    "evaluation.metric",
    "model.learning_rate",
    "optimizer.name",
    "init.direction",
    "peft.use_peft",
    "peft.dora",
    "peft.adalora",
}
FOLLOWS_METHOD = ("init.scale", "init.stable_gamma", "init.bsz", "init.iters", "init.max_length")
FOLLOWS_OPTIMISER = ("optimizer.damping", "optimizer.lr_ratio")


@dataclass(frozen=True)
class Group:
    """Finished runs of the same settings under different seeds.

    Attributes:
        runs: At least one.
    """

    runs: tuple[Run, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the first run: all but the seeds are those of every run."""
        return self.runs[0].settings

    @property
    def method(self) -> str:
        """What ran, as the record says."""
        return self.runs[0].record["method"]

    @property
    def optimiser(self) -> str:
        """``none`` where the start itself is the result."""
        return self.settings["optimizer.name"] if self.is_trained else "none"

    @property
    def learning_rate(self) -> float | None:
        """None where there was no training."""
        return self.settings["model.learning_rate"] if self.is_trained else None

    @property
    def is_trained(self) -> bool:
        """Whether these runs trained."""
        return is_trained(self.settings)

    @property
    def is_trial(self) -> bool:
        """Whether these runs served to choose a setting: no test row was asked."""
        return self.settings.get("evaluation.metric") == "validation_loss"

    @property
    def primary_metric(self) -> str:
        """The metric that this benchmark is about."""
        return self.runs[0].record["primary_metric"]

    @property
    def test_rows(self) -> int | None:
        """How many test rows were scored; None where none was asked, or that is not known."""
        counted = self.runs[0].record["metrics"].get("n")
        if self.is_trial or not isinstance(counted, int):
            return None
        # Of several replies to a row all are counted; a loss is taken of the row itself.
        replies = self.settings.get("evaluation.samples") or 1
        return counted if self.primary_metric == "test_loss" else counted // replies

    def values(self, metric: str) -> list[float | None]:
        """One value per run, None where a run has none."""
        return [run.record["metrics"].get(metric) for run in self.runs]

    def by_seed(self, metric: str) -> dict[str, float]:
        """Seed(s) of a run -> its value, for pairing with another group."""
        return {
            seed_key(run.settings): value
            for run, value in zip(self.runs, self.values(metric), strict=True)
            if value is not None
        }

    @property
    def validation_losses(self) -> list[float | None]:
        """The last validation loss of each run."""
        return [run.record["losses"]["validation"] for run in self.runs]

    @property
    def init_seconds(self) -> list[float]:
        """What each start cost when it was computed, also where a run found it in the cache."""
        return [_init_seconds(run.record) for run in self.runs]

    @property
    def train_seconds(self) -> list[float]:
        """Seconds of each training; 0 where there was none."""
        phases = [run.record["phases"] for run in self.runs]
        return [phase["train"]["seconds"] if "train" in phase else 0.0 for phase in phases]

    @property
    def peak_memory(self) -> int:
        """Bytes: the largest of all phases and runs."""
        return max(
            phase["peak_memory_bytes"]
            for run in self.runs
            for phase in run.record["phases"].values()
        )


def as_text(value: Any) -> str:
    """Return a setting, or several, as text that is equal where they are."""
    return json.dumps(value, sort_keys=True, default=str)


def without_seeds(settings: dict[str, Any], more: Collection[str] = ()) -> dict[str, Any]:
    """Return settings without the seeds, and without some more."""
    return {key: value for key, value in settings.items() if key not in SEEDS and key not in more}


def seed_key(settings: dict[str, Any]) -> str:
    """Return all seeds of a run as one key; equal keys make a pair."""
    return as_text([settings.get(name) for name in SEEDS])


def group_runs(runs: Sequence[Run]) -> tuple[list[Group], list[tuple[Run, Run]]]:
    """Group the finished runs.

    A seed counts once in a group: the copy of a run is no second one. So do untrained runs that
    gave the same replies under other seeds: nothing in them was random. Either would feign a
    standard deviation of 0.

    Returns:
        The groups, and of each run that repeats another (the first, the repeat).
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.status == "finished":
            settings = without_seeds(run.settings)
            # One path may have led to other files.
            read = [test_row_ids(run), (run.record.get("adapter") or {}).get("sha256")]
            groups.setdefault(as_text([settings, read]), []).append(run)
    repeats = [pair for members in groups.values() for pair in _take_repeats(members)]
    return [Group(tuple(members)) for members in groups.values()], repeats


def diverged_runs(runs: Sequence[Run]) -> list[Run]:
    """Return the trained runs that ended because a number was not finite, each seed once."""
    found: dict[str, Run] = {}
    for run in runs:
        error = run.record.get("error")
        kind = error.get("type") if isinstance(error, dict) else None
        if run.status == "failed" and kind == NonFiniteError.__name__ and is_trained(run.settings):
            found.setdefault(as_text(run.settings), run)
    return list(found.values())


def _take_repeats(group: list[Run]) -> list[tuple[Run, Run]]:
    """Take the runs that repeat another out of a group; return both of each."""
    seen: dict[str, Run] = {}
    repeats = []
    for run in list(group):
        first = next((seen[trait] for trait in _traits(run) if trait in seen), run)
        if first is not run:
            group.remove(run)
            repeats.append((first, run))
        seen |= dict.fromkeys(_traits(run), first)
    return repeats


def _traits(run: Run) -> list[str]:
    """What no two runs of a group may share: the seeds and, without training, the outcome."""
    replies = (run.record.get("evaluation") or {}).get("replies_sha256")
    if is_trained(run.settings) or replies is None:
        return [seed_key(run.settings)]
    # A start that differs shows in the loss before it shows in a greedy reply.
    return [seed_key(run.settings), as_text([replies, run.record["losses"]["validation"]])]


def varied_settings(groups: Sequence[Group]) -> list[str]:
    """Settings in which runs of the same method and optimiser differ: they need a column."""
    varied: set[str] = set()
    for key in sorted({key for group in groups for key in group.settings}):
        if key in SEEDS or key in SHOWN:
            continue
        same_method: dict[tuple[Any, ...], set[str]] = {}
        for group in groups:
            settings = group.settings
            kin: tuple[Any, ...] = ()
            if key in FOLLOWS_METHOD:
                # The ranks of a method without a gradient may follow one.
                kin = (group.method, settings.get("init.rank_allocation"))
            elif key in FOLLOWS_OPTIMISER:
                kin = (settings.get("optimizer.name"),)
            elif key.startswith("dataset.") and key != "dataset.name":
                # Each benchmark has options of its own.
                kin = (settings.get("dataset.name"),)
            same_method.setdefault(kin, set()).add(as_text(settings.get(key)))
        if any(len(values) > 1 for values in same_method.values()):
            varied.add(key)
    return sorted(varied)


def test_row_ids(run: Run) -> str | None:
    """Return what tells the test rows of a run from others, short enough to be shown."""
    data = run.record.get("data")
    rows = data.get("test_row_ids_sha256") if isinstance(data, dict) else None
    return None if rows is None else str(rows)[:8]


def _init_seconds(record: dict[str, Any]) -> float:
    computed = (record.get("init") or {}).get("seconds")
    if computed is not None:
        return computed
    return record["phases"]["init"]["seconds"] if "init" in record["phases"] else 0.0

"""A fair comparison: every method tuned with the same number of trials, then judged on new seeds.

An *arm* is what is compared, a method with an optimiser. A *trial* trains one of its settings with
the tuning seed and is judged by the validation loss; no test row is asked. Once all arms have had
their trials (``tuning.search``), each runs at its best setting with every seed of
``comparison.seeds`` and is evaluated on the test rows.

Trials and final runs are ordinary runs in ordinary folders, so that a comparison that was
interrupted goes on when the same command is given again, several processes can share it, and the
report reads it without knowing of this module.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

from lora_one.errors import InputError
from lora_one.harness.config.compose import Point, compose_config
from lora_one.harness.config.schema import ComparisonConfig, Config
from lora_one.harness.console import say
from lora_one.harness.distributed.peers import share
from lora_one.harness.distributed.ranks import is_main
from lora_one.harness.exit_status import DONE, FAILED, TRY_AGAIN
from lora_one.harness.records.folder import finished_record, read_record, run_id
from lora_one.harness.sweeps.tuning import TUNED, Setting, best, search

Execute = Callable[[list[Point]], int]
"""Runs points and returns an exit status, as ``sweep.run_points`` does."""

SEED, METRIC = "seed", "evaluation.metric"
DIVERGED = float("inf")
"""The validation loss of a run whose numbers stopped being finite."""


@dataclass(frozen=True)
class Arm:
    """One method with one optimiser.

    Attributes:
        overrides: What composes to it.
        config: At the settings from which the search starts.
        names: Of the settings that it is tuned over, as keys of ``comparison.grid``.
        own: The overrides that tell it from arms of the same method and optimiser.
    """

    overrides: tuple[str, ...]
    config: Config
    names: tuple[str, ...]
    own: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What the terminal calls it."""
        scaling = "" if self.config.peft.use_rslora else ", alpha / r"
        allocation = self.config.init.rank_allocation
        ranks = "" if allocation == "uniform" else f", ranks by {allocation}"
        name = f"{self.config.method} · {self.config.optimizer.name}{scaling}{ranks}"
        return ", ".join([name, *self.own])

    @property
    def axes(self) -> list[list[float]]:
        """Its grid, the learning rate first."""
        grid = self.config.comparison.grid
        return [getattr(grid, name) for name in self.names]

    @property
    def start(self) -> Setting:
        """Its settings as configured."""
        return tuple(_value(self.config, TUNED[name]) for name in self.names)

    def run(self, setting: Setting, *more: str) -> Point:
        """Compose a run of it at a setting; call inside ``composer``."""
        values = [f"{TUNED[name]}={v!r}" for name, v in zip(self.names, setting, strict=True)]
        own = [one for one in self.overrides if _key(one).partition(".")[0] != "comparison"]
        overrides = (*own, *values, *more, "comparison=none")
        return Point(overrides, compose_config(overrides))

    def words(self, setting: Setting) -> str:
        """Say where a setting stands."""
        values = zip(self.names, setting, strict=True)
        return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in values)


def make_arms(points: Sequence[Point], multirun: bool) -> list[Arm]:
    """Find out what is compared: the points of a sweep, or the arms of the preset.

    Call inside ``composer``.

    Raises:
        InputError: the points disagree about the comparison, or a value that was given would be
            overruled by it.
    """
    comparison = points[0].config.comparison
    if any(point.config.comparison != comparison for point in points):
        raise InputError("comparison: all points of a sweep are arms of one comparison. Give one.")
    lines = [()] if multirun else [tuple(line.split()) for line in comparison.arms]
    decided = {*TUNED.values(), SEED}
    for point in points:
        for override in point.overrides:
            if _key(override) in decided:
                raise InputError(
                    f"{override}: the comparison decides it. Change comparison.grid, "
                    "comparison.tuning_seed or comparison.seeds."
                )
            if any(_key(override) == _key(own) for line in lines for own in line):
                raise InputError(
                    f"{override}: every arm of comparison.arms has its own. Add -m: then the "
                    "points of the sweep are the arms."
                )
    arms: dict[str, Arm] = {}
    for point in points:
        for line in lines:
            overrides = (*point.overrides, *line)
            config = compose_config(overrides)
            names = tuple(name for name in TUNED if _is_tuned(config, name))
            arms.setdefault(run_id(config), Arm(overrides, config, names))
    return _tell_apart(list(arms.values()))


def _tell_apart(arms: Sequence[Arm]) -> list[Arm]:
    """Add to arms of the same title the overrides in which they differ."""
    shared: dict[str, set[str]] = {}
    for arm in arms:
        shared.setdefault(arm.title, set(arm.overrides)).intersection_update(arm.overrides)
    own = [tuple(one for one in arm.overrides if one not in shared[arm.title]) for arm in arms]
    return [replace(arm, own=these) for arm, these in zip(arms, own, strict=True)]


def compare(arms: Sequence[Arm], execute: Execute) -> int:
    """Tune all arms side by side, run each at its best setting, and show the comparison.

    Args:
        arms: At least one.
        execute: Runs points.

    Returns:
        0 if everything is finished, else the status of what kept it from going on.
    """
    comparison = arms[0].config.comparison
    losses, status = _tune(arms, comparison, execute)
    if status != DONE:
        return status
    chosen = [best(tried) for tried in losses]
    for arm, setting, tried in zip(arms, chosen, losses, strict=True):
        if tried[setting] == DIVERGED:
            say(f"failed: {arm.title} diverged at all of its {len(tried)} settings")
            return FAILED
        say(f"chosen: {arm.title}: {arm.words(setting)} (validation loss {tried[setting]:.4f})")
    finals = [
        arm.run(setting, f"{SEED}={seed}")
        for seed in comparison.seeds
        for arm, setting in zip(arms, chosen, strict=True)
    ]
    say(f"\nfinal runs: {len(arms)} arms x {len(comparison.seeds)} seeds")
    status = _execute(finals, execute)
    outcomes = share([_outcome(point) for point in finals])
    if status == DONE and None in outcomes:
        return _later("final runs", outcomes)
    trials = [_trial(arm, s) for arm, tried in zip(arms, losses, strict=True) for s in tried]
    if is_main():
        _show([*trials, *finals])
    # A trial that diverged has been counted; a final run that did is missing from the table.
    diverged = outcomes.count(DIVERGED)
    if diverged:
        say(f"failed: {diverged} of {len(finals)} final runs diverged and are not in the table")
    return status or (FAILED if diverged else DONE)


def describe(arms: Sequence[Arm]) -> list[Point]:
    """Say what a comparison would run, and return the first trial of each arm."""
    comparison = arms[0].config.comparison
    trials, seeds = comparison.trials, comparison.seeds
    say(
        f"comparison: {len(arms)} arms x ({trials} trials with seed {comparison.tuning_seed} + "
        f"{len(seeds)} final runs with seeds {', '.join(map(str, seeds))}) = "
        f"{len(arms) * (trials + len(seeds))} runs"
    )
    for arm in arms:
        grid = "; ".join(
            f"{name.replace('_', ' ')} {', '.join(f'{value:g}' for value in values)}"
            for name, values in zip(arm.names, arm.axes, strict=True)
        )
        say(f"  {arm.title}: {grid}")
    return [_trial(arm, (arm.axes[0][0], *arm.start[1:])) for arm in arms]


def _tune(
    arms: Sequence[Arm], comparison: ComparisonConfig, execute: Execute
) -> tuple[list[dict[Setting, float]], int]:
    """Search, all arms in step: return what each has tried, and 0 or what stopped it."""
    searches = [search(arm.axes, arm.start, comparison.trials) for arm in arms]
    wanted = [next(one) for one in searches]
    losses: list[dict[Setting, float]] = [{} for _ in arms]
    while any(wanted):
        trials = {
            (at, setting): _trial(arm, setting)
            for at, (arm, settings) in enumerate(zip(arms, wanted, strict=True))
            for setting in settings
        }
        done = sum(map(len, losses))
        say(
            f"\ntuning: trials {done + 1} to {done + len(trials)} of "
            f"{len(arms) * comparison.trials}"
        )
        status = _execute(list(trials.values()), execute)
        outcomes = share([_outcome(point) for point in trials.values()])
        if None in outcomes:
            return losses, status or _later("trials", outcomes)
        for (at, setting), loss in zip(trials, outcomes, strict=True):
            losses[at][setting] = loss
        wanted = [
            _next(one, {setting: losses[at][setting] for setting in wanted[at]})
            for at, one in enumerate(searches)
        ]
    return losses, DONE


def _later(what: str, outcomes: Sequence[float | None]) -> int:
    """Say that runs were handed over and are not waited for, ``launcher.wait=false``."""
    say(f"{outcomes.count(None)} {what} are under way; the same command goes on when they are done")
    return TRY_AGAIN


def _next(
    one: Generator[list[Setting], Mapping[Setting, float], None], results: Mapping[Setting, float]
) -> list[Setting]:
    """Send a search its results; return what it wants next, nothing at its end."""
    if not results:
        return []
    try:
        return one.send(results)
    except StopIteration:
        return []


def _trial(arm: Arm, setting: Setting) -> Point:
    seed = arm.config.comparison.tuning_seed
    return arm.run(setting, f"{SEED}={seed}", f"{METRIC}=validation_loss")


def _execute(points: list[Point], execute: Execute) -> int:
    """Run what is not done; a trial that diverged is done."""
    todo = share([index for index, point in enumerate(points) if _outcome(point) is None])
    return execute([points[index] for index in todo]) if todo else DONE


def _outcome(point: Point) -> float | None:
    """Return a run's validation loss, ``DIVERGED`` where it did; None where it is not done."""
    if record := finished_record(point.config):
        return record["losses"]["validation"]
    record = read_record(Path(point.config.output_dir) / run_id(point.config)) or {}
    diverged = (record.get("error") or {}).get("type") == "NonFiniteError"
    return DIVERGED if record.get("status") == "failed" and diverged else None


def _show(points: Sequence[Point]) -> None:
    """Print the comparison as the report shows it."""
    from lora_one.reports.build import comparison_table
    from lora_one.reports.comparison import compare as compare_groups
    from lora_one.reports.groups import diverged_runs, group_runs
    from lora_one.reports.records import load_runs
    from lora_one.reports.table import render_comparison

    folders = [Path(point.config.output_dir) / run_id(point.config) for point in points]
    runs = load_runs(folders)
    blocks = compare_groups(group_runs(runs)[0], diverged_runs(runs))
    render_comparison(comparison_table(blocks))
    folder = points[0].config.output_dir
    say(f"the report, with plots: python -m lora_one.reports {folder}")


def _is_tuned(config: Config, name: str) -> bool:
    """Tell whether an arm has a setting, and the grid has values for it."""
    value = _value(config, TUNED[name])
    return bool(getattr(config.comparison.grid, name)) and isinstance(value, int | float)


def _value(config: Config, key: str) -> Any:
    return reduce(lambda section, name: getattr(section, name, None), key.split("."), config)


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")

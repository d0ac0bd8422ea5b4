"""A fair comparison from the command line: trials, choice, final runs, all in ordinary folders."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lora_one.errors import InputError
from lora_one.harness.config.compose import Point, compose_config, composer, expand
from lora_one.harness.exit_status import DONE, FAILED, TRY_AGAIN
from lora_one.harness.sweeps.comparison import compare as compare_arms
from lora_one.harness.sweeps.comparison import make_arms
from lora_one.reports.comparison import compare
from lora_one.reports.groups import group_runs
from lora_one.reports.records import find_runs

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("tuned_run.py")
FAIR = "experiment=fair/arithmetic"
# A grid whose middle is neither method's best rate.
SMALL = [
    "comparison.grid.learning_rate=[1e-3,4e-3]",
    "comparison.grid.stable_gamma=[32]",
    "comparison.trials=5",
    "comparison.seeds=[1,2]",
]


@pytest.fixture
def launch(tmp_path):
    """Give a command line to the real launcher; the runs only write records."""

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(PROGRAM), *arguments, f"output_dir={tmp_path / 'results'}"],
            env=os.environ | {"PYTHONPATH": str(ROOT), "TUNED_RUNS": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return start


def records(tmp_path: Path) -> dict[str, dict]:
    files = (tmp_path / "results").glob("*/run.json")
    return {file.parent.name: json.loads(file.read_text()) for file in files}


@pytest.mark.slow
def test_equal_trials_then_the_best_on_new_seeds_and_the_same_command_does_nothing_twice(
    launch, tmp_path
):
    command = ["-m", FAIR, "init=lora,lora_one", *SMALL]
    (tmp_path / "fail").touch()
    failed = launch(*command)
    assert failed.returncode == 1, failed.stderr
    kinds = Counter(
        (record["method"], record["primary_metric"]) for record in records(tmp_path).values()
    )
    assert kinds == {
        (method, metric): count
        for method in ("lora", "lora_one")
        for metric, count in (("validation_loss", 5), ("accuracy", 2))
    }
    (tmp_path / "fail").unlink()
    done = launch(*command)
    assert done.returncode == 0, done.stderr
    starts = Counter((tmp_path / "starts").read_text().split())
    assert {
        starts[name]
        for name, record in records(tmp_path).items()
        if record["primary_metric"] == "validation_loss"
    } == {1}
    again = launch(*command)
    assert again.returncode == 0
    assert Counter((tmp_path / "starts").read_text().split()) == starts

    (block,) = compare(group_runs(find_runs(tmp_path / "results"))[0])
    rows = {row.arm.name: row for row in block.rows}
    assert {name: len(row.arm.tried) for name, row in rows.items()} == {
        "lora · adamw": 5,
        "lora_one · adamw": 5,
    }
    lora, lora_one = (rows[f"{name} · adamw"].arm for name in ("lora", "lora_one"))
    # The nearest tried rate to the valley's floor at 2e-3, and gamma's at 32.
    assert lora.chosen.learning_rate == 2e-3
    assert lora_one.chosen.settings["init.stable_gamma"] == 32
    assert lora_one.chosen.learning_rate < 1e-3
    for arm in (lora, lora_one):
        assert len(arm.chosen.runs) == 2 and not arm.chosen.is_trial
        assert arm.seconds == 7 * 4.0  # 5 trials and 2 final runs, start and training
    assert f"chosen: lora · adamw: learning rate {lora.chosen.learning_rate:g}" in done.stdout
    assert "cannot be told" in done.stdout or "worse" in done.stdout


@pytest.mark.slow
def test_a_rate_that_diverges_is_a_trial_that_lost(launch, tmp_path):
    (tmp_path / "diverge").touch()
    done = launch(
        "-m",
        FAIR,
        "init=lora",
        "comparison.grid.learning_rate=[4e-3,1.6e-2]",
        "comparison.trials=4",
        "comparison.seeds=[1]",
    )
    assert done.returncode == 0, done.stderr
    kinds = Counter(record["status"] for record in records(tmp_path).values())
    assert kinds["failed"] >= 1
    assert sum(kinds.values()) == 4 + 1


@pytest.mark.slow
def test_a_final_run_that_diverges_is_missing_however_often_the_command_is_given(launch, tmp_path):
    (tmp_path / "diverge_at_last").touch()
    command = ["-m", FAIR, "init=lora", "comparison.trials=3", "comparison.seeds=[1]"]
    for _ in range(2):
        done = launch(*command)
        assert done.returncode == FAILED, done.stderr
        assert "failed: 1 of 1 final runs diverged" in done.stdout
    assert len((tmp_path / "starts").read_text().split()) == 3 + 1


def arms_of(*overrides: str, multirun: bool = False):
    with composer(ROOT / "conf"):
        if multirun:
            points = expand(list(overrides))[0]
        else:
            points = [Point(overrides, compose_config(overrides))]
        return make_arms(points, multirun)


def test_the_preset_compares_five_methods_with_two_optimisers():
    arms = arms_of(FAIR)
    assert len(arms) == 10
    assert Counter(arm.config.method for arm in arms) == {
        "lora": 4,
        "pissa": 2,
        "lora_ga": 2,
        "lora_one": 2,
    }
    assert {arm.config.optimizer.name for arm in arms} == {"adamw", "preconditioned_adamw"}
    assert sum(not arm.config.peft.use_rslora for arm in arms) == 2


def test_an_arm_is_tuned_over_what_it_has():
    names = {arm.title: arm.names for arm in arms_of(FAIR)}
    assert names["lora · adamw"] == ("learning_rate",)
    assert names["lora_one · adamw"] == ("learning_rate", "stable_gamma")
    assert names["lora_ga · preconditioned_adamw"] == ("learning_rate", "stable_gamma", "damping")


def test_points_of_a_sweep_are_the_arms():
    arms = arms_of(FAIR, "init=lora_one", "peft.lora_r=4,8,16", multirun=True)
    assert [arm.config.peft.lora_r for arm in arms] == [4, 8, 16]
    assert [arm.title for arm in arms] == [f"lora_one · adamw, peft.lora_r={r}" for r in (4, 8, 16)]


def test_a_trial_differs_from_a_final_run_in_seed_and_metric_only():
    (arm,) = arms_of(FAIR, "init=lora_one", multirun=True)
    with composer(ROOT / "conf"):
        trial = arm.run((1e-3, 64.0), "seed=0", "evaluation.metric=validation_loss").config
        final = arm.run((1e-3, 64.0), "seed=1").config
        by_hand = compose_config(
            [
                "model.learning_rate=1e-3",
                "init.stable_gamma=64",
                "dataset.train_rows=2048",
                "model.eval_epochs=0.5",
                "seed=1",
            ]
        )
    assert final == by_hand
    trial, final = trial.model_dump(), final.model_dump()
    assert trial.pop("evaluation") | {"metric": "task"} == final.pop("evaluation")
    differing = {
        f"{section}.{key}"
        for section in ("dataset", "model", "init")
        for key in trial[section]
        if trial[section][key] != final[section][key]
    }
    assert differing == {"dataset.seed", "model.seed", "init.seed"}


@pytest.mark.parametrize(
    ("overrides", "multirun", "said"),
    [
        (["init=pissa"], False, "every arm of comparison.arms has its own. Add -m"),
        (["model.learning_rate=1e-3"], False, "the comparison decides it"),
        (["seed=1,2", "init=lora"], True, "the comparison decides it"),
        (["comparison.trials=2"], False, "each of which is tried"),
        (["comparison.seeds=[0,1]"], False, "its luck would count twice"),
        (["comparison.grid.learning_rate=[2e-3,1e-3]"], False, "expected ascending values"),
        (["comparison.trails=4"], False, "Did you mean 'trials'"),
        (["comparison.grid.gamma=[1]"], False, "nothing reads this key"),
        (["train=none"], False, "tunes a training"),
        (["evaluation.metric=validation_loss"], False, "ends with test rows"),
    ],
)
def test_what_contradicts_a_comparison_is_refused_in_one_message(overrides, multirun, said):
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        arms_of(FAIR, *overrides, multirun=multirun)


def test_a_dry_run_counts_the_runs_and_writes_nothing(launch, tmp_path):
    shown = launch("-m", FAIR, "init=lora,lora_one", "dry_run=true")
    assert shown.returncode == 0, shown.stderr
    assert "2 arms x (6 trials with seed 0 + 3 final runs with seeds 1, 2, 3) = 18 runs" in (
        shown.stdout
    )
    assert not (tmp_path / "results").exists()


def test_what_is_handed_over_and_not_waited_for_is_said_and_is_not_done(tmp_path, capsys):
    handed_over = []

    def hand_over(points):
        handed_over.extend(points)
        return DONE

    with composer(ROOT / "conf"):
        overrides = (FAIR, "init=lora", *SMALL, f"output_dir={tmp_path}")
        arms = make_arms([Point(overrides, compose_config(overrides))], multirun=True)
        assert compare_arms(arms, hand_over) == TRY_AGAIN
    assert len(handed_over) == 2
    assert "2 trials are under way; the same command goes on" in capsys.readouterr().out

"""Jobs: arrays, and what happens to a run when its job is taken away."""

import json
import shlex

import pytest

from .cluster import CPU, PROGRAM, call, read_json, records, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_an_array_does_each_unfinished_point_and_ends_in_one_table(tiny, results):
    done = call(*PROGRAM, *tiny, "init=lora", "seed=0")
    assert done.returncode == 0, done.stderr
    command = [
        *PROGRAM,
        "-m",
        *CPU,
        *tiny,
        "init=lora,pissa",
        "seed=0,1",
        "launcher.max_parallel=3",
    ]
    answer = call(*command)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "already done: 1 of 4" in answer.stdout
    assert "submitted 3 as job" in answer.stdout
    assert [record["status"] for record in records(results)] == ["finished"] * 4
    rows = [line.split() for line in answer.stdout.splitlines()]
    assert {row[0]: row[3] for row in rows if row and row[0] in ("lora", "pissa")} == {
        "lora": "2",
        "pissa": "2",
    }
    (snapshot,) = (results / "snapshots").iterdir()
    ran = [r for r in records(results) if str(snapshot) in r["command"]]
    assert len(ran) == 3
    known = json.loads((snapshot / "source.json").read_text())["git"]
    assert all(record["provenance"]["git"] == known for record in ran)
    (sweep,) = (results / "sweeps").glob("*.md")
    assert all(f"wandb.group='{sweep.stem}'" in shlex.split(r["command"]) for r in ran)

    again = call(*command)
    assert again.returncode == 0
    assert "already done: 4 of 4" in again.stdout
    assert "submitted" not in again.stdout


def test_a_comparison_is_one_array_per_round_and_ends_in_its_table(tiny, results):
    rounds = ["learning_rate=[1e-3,4e-3]", "stable_gamma=[]", "damping=[]"]
    answer = call(
        *PROGRAM,
        "-m",
        *CPU,
        *tiny,
        *("init=lora", "optimizer=adamw", "comparison=small_model"),
        *(f"comparison.grid.{axis}" for axis in rounds),
        *("comparison.trials=2", "comparison.seeds=[1,2]"),
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout.count("submitted 2 as job") == 2
    assert answer.stdout.index("tuning: trials 1 to 2 of 2") < answer.stdout.index("chosen: lora")
    assert sorted((r["seed"], r["primary_metric"]) for r in records(results)) == [
        (0, "validation_loss"),
        (0, "validation_loss"),
        (1, "accuracy"),
        (2, "accuracy"),
    ]
    assert "settings tried" in answer.stdout


def test_a_run_whose_job_is_requeued_goes_on_and_finishes(submit, long, results):
    submission = submit(*long)
    submission.wait_for_steps(20)
    assert call("scontrol", "requeue", submission.job).returncode == 0
    status, said = submission.end()
    assert status == 0, said
    assert "was requeued" in said
    _finished_without_repeating_a_step(results)


def test_a_run_that_reaches_its_time_limit_goes_on_in_the_next_job(submit, long, results):
    # A job of two minutes that has to stop 110 seconds before its end, which is long before it
    # has done so many steps; the next one gets more.
    limit = ["launcher.timeout_min=2", "preemption.margin_seconds=110"]
    submission = submit(*long, "model.max_steps=400", *limit)
    (run,) = wait_until(lambda: list(results.glob("*/run.json")))
    wait_until(lambda: read_json(run).get("status") == "preempted")
    more = ["scontrol", "update", f"JobId={submission.job}", "TimeLimit=10"]
    assert call(*more).returncode == 0
    status, said = submission.end()
    assert status == 0, said
    assert "was requeued" in said
    _finished_without_repeating_a_step(results)


def _finished_without_repeating_a_step(results):
    (record,) = records(results)
    assert record["status"] == "finished"
    (file,) = results.glob("*/metrics.jsonl")
    lines = map(json.loads, file.read_text().splitlines())
    steps = [line["step"] for line in lines if "learning_rate" in line]
    assert steps == list(range(1, record["train"]["steps"] + 1))


def test_a_cancelled_run_says_so_and_stays_away(submit, long, results):
    submission = submit(*long)
    submission.wait_for_steps(5)
    assert call("scancel", submission.job).returncode == 0
    status, said = submission.end()
    assert status == 75, said
    assert "cancelled" in said
    (record,) = records(results)
    assert record["status"] == "preempted"
    assert "SIGTERM" in record["preempted"]["reason"]
    assert not call("squeue", "--noheader", f"--jobs={submission.job}").stdout.strip()


def test_a_failed_and_a_killed_run_are_named_with_the_end_of_their_errors(submit, long, results):
    # One rate diverges, the other run is killed as by the kernel when memory is out.
    submission = submit("-m", *long, "model.learning_rate=1e-3,1e30", "model.max_grad_norm=null")
    slow = wait_until(
        lambda: [f for f in results.glob("*lr0.001*/metrics.jsonl") if f.stat().st_size]
    )[0]
    # The step, not the job, which SLURM would then call cancelled.
    assert call("scancel", "--signal=KILL", f"{submission.job}_0.0").returncode == 0
    status, said = submission.end()
    assert status == 1, said
    assert f"failed (FAILED): {slow.parent.name}" in said
    assert "failed: step" in said
    assert said.count("all of it: ") == 2


def test_what_slurm_refuses_is_bad_input_and_leaves_nothing(tiny, results):
    for dry_run in ("false", "true"):
        command = [*PROGRAM, *CPU, *tiny, "launcher.partition=nowhere", f"dry_run={dry_run}"]
        answer = call(*command)
        assert answer.returncode == 2
        assert "invalid partition specified: nowhere" in answer.stderr
        assert not results.exists()


def test_without_waiting_the_command_says_how_to_look_and_how_to_cancel(tiny, results):
    answer = call(*PROGRAM, *CPU, *tiny, "launcher.wait=false", "launcher.additional.hold=true")
    assert answer.returncode == 0, answer.stderr
    (cancel,) = [line for line in answer.stdout.splitlines() if line.startswith("cancel")]
    assert f"python -m lora_one.reports status {results}" in answer.stdout
    assert call(*cancel.partition(": ")[2].split()).returncode == 0

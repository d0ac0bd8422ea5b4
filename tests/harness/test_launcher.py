"""The SLURM launchers without a SLURM: settings, snapshots, how a job is judged by its run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_one.errors import InputError
from lora_one.harness.config.compose import Point
from lora_one.harness.exit_status import BAD_INPUT, DONE, FAILED, TRY_AGAIN
from lora_one.harness.records.folder import run_id
from lora_one.harness.records.source import commit, take_snapshot
from lora_one.harness.slurm import queue, watch
from lora_one.harness.slurm import submit as submission
from lora_one.harness.slurm.options import as_flags, sbatch_options

ROOT = Path(__file__).parents[2]

BAD = {
    "launcher=slurm": "launcher=slurm: no such choice. Did you mean",
    "launcher.partition=gpu": "launcher=local starts no job, so nothing reads this key.",
    "launcher=slurm_1gpu launcher.partitio=gpu": "Did you mean 'partition'?",
    "launcher=slurm_node launcher.tasks_per_node=2": "every task is one rank with one GPU",
    "launcher=slurm_1gpu launcher.timeout_min=5": "signal_delay_s=300 is as long as the job",
    "launcher=slurm_1gpu launcher.timeout_min=2 launcher.signal_delay_s=10": (
        "preemption.margin_seconds=120 is as long as the job"
    ),
    "launcher=slurm_1gpu launcher.timeout_min=0": "expected greater than 0",
    "launcher=slurm_1gpu launcher.additional.time=5": "give launcher.timeout_min.",
    "launcher=slurm_1gpu launcher.additional.array=0-3": "the points decide it",
    "launcher.name=lsf": "launcher.name=lsf: no such launcher. Valid: local, slurm.",
}


@pytest.mark.parametrize(("overrides", "message"), BAD.items())
def test_each_mistake_is_named(compose, overrides, message):
    with pytest.raises(InputError, match=re.escape(message)):
        compose(*overrides.split())


def test_the_launcher_does_not_change_the_run(compose):
    assert run_id(compose("launcher=slurm_multinode")) == run_id(compose())


def test_a_job_has_one_task_per_gpu(compose):
    options = sbatch_options(compose("launcher=slurm_multinode", "launcher.nodes=3").launcher)
    assert (options["nodes"], options["gpus-per-node"], options["ntasks-per-node"]) == (3, 8, 8)
    assert options["mem"] == "0M"
    cpu = sbatch_options(compose("launcher=slurm_1gpu", "launcher.gpus_per_node=0").launcher)
    assert "gpus-per-node" not in cpu
    assert cpu["ntasks-per-node"] == 1


def test_every_key_reaches_sbatch(compose):
    launcher = compose(
        "launcher=slurm_1gpu",
        *["launcher.account=a", "launcher.partition=p", "launcher.qos=q", "launcher.constraint=c"],
        *["launcher.job_name=j", "launcher.timeout_min=90", "launcher.signal_delay_s=60"],
        *["launcher.additional={exclude: node7, exclusive: true}", "launcher.mem_gb=1.5"],
    ).launcher
    assert as_flags(sbatch_options(launcher)) == [
        *["--job-name=j", "--account=a", "--partition=p", "--qos=q", "--constraint=c"],
        *["--nodes=1", "--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=8"],
        *["--mem=1536M", "--time=90", "--signal=USR2@60", "--requeue"],
        *["--exclude=node7", "--exclusive"],
    ]


def test_points_of_one_array_have_one_launcher(compose):
    points = [Point((), compose("launcher=slurm_1gpu", f"launcher.nodes={n}")) for n in (1, 2)]
    with pytest.raises(InputError, match="the same launcher"):
        submission.make_order(points)


def test_without_sbatch_nothing_is_submitted_and_nothing_written(tmp_path):
    results = tmp_path / "results"
    command = [sys.executable, str(ROOT / "run_exp.py"), "launcher=slurm_1gpu"]
    answer = subprocess.run(
        [*command, f"output_dir={results}"],
        env=os.environ | {"PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == BAD_INPUT, answer.stderr
    assert answer.stderr.startswith("error: launcher=slurm_...: there is no sbatch on PATH.")
    assert answer.stderr.count("\n") == 1
    assert not results.exists()


def test_several_ranks_may_not_submit_the_same_jobs(compose, monkeypatch):
    monkeypatch.setattr(submission, "world_size", lambda: 2)
    monkeypatch.setattr(submission.shutil, "which", lambda _: "/bin/sbatch")
    with pytest.raises(InputError, match="under 2 ranks"):
        submission.submit([Point((), compose("launcher=slurm_1gpu"))], "run_exp.py", False)


def test_a_number_that_slurm_gave_to_another_job_since_is_not_taken_for_the_runs(
    small, monkeypatch, tmp_path
):
    config = small("launcher=slurm_1gpu")
    logs = Path(config.output_dir) / "slurm" / "20261128-060000-abc"
    logs.mkdir(parents=True)
    (logs / submission.JOBS).write_text(json.dumps({run_id(config): "7_0"}))
    squeue = tmp_path / "squeue"
    squeue.touch(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def submitted(stderr) -> list[str]:
        squeue.write_text(f"#!/bin/sh\necho '7_0|RUNNING|None|0|{stderr}|'\n")
        _, tasks = submission.make_order([Point((), config)])
        return [task.job for task in tasks]

    # The same folder, as another login node may see it.
    assert submitted(f"/mnt/a|b/slurm/{logs.name}/%A_%a_%t_log.err") == ["7_0"]
    assert submitted("/home/somebody/%A.err") == submitted("N/A") == []


def test_a_job_has_the_options_of_its_launcher_and_nothing_of_a_job_around_it(
    small, monkeypatch, tmp_path
):
    config = small("launcher=slurm_1gpu", "launcher.wait=false")
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/sh\nenv > {tmp_path}/env\necho Submitted batch job 5\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    job = {"SLURM_JOB_ID": "4", "SLURM_MEM_PER_CPU": "500", "SLURM_RESTART_COUNT": "3"}
    kept = {"SLURM_CONF": "/conf", "SBATCH_ACCOUNT": "me", "SLURMX": "x"}
    for name, value in (job | kept).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(submission, "take_snapshot", lambda program, _: program)
    assert submission.submit([Point((), config)], str(ROOT / "run_exp.py"), False) == DONE
    (script,) = Path(config.output_dir).glob("slurm/*/5_submission.sh")
    asked = re.findall("^#SBATCH (--[a-z-]+)", script.read_text(), flags=re.MULTILINE)
    known = {f"--{name}" for name in sbatch_options(config.launcher)}
    assert set(asked) == known | {"--output", "--error", "--open-mode"}
    seen = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
    assert not job.keys() & seen.keys()
    assert kept.items() <= seen.items()
    assert job.items() <= os.environ.items()


def test_a_dry_run_lets_slurm_judge_the_array_too(compose, monkeypatch, tmp_path):
    refusal = "allocation failure: Invalid job array specification"
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/sh\ncase "$*" in *--array=0-1*) echo {refusal} >&2; exit 1;; esac\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    common = ["launcher=slurm_1gpu", f"output_dir={tmp_path}/results"]
    points = [Point((), compose(*common, f"seed={seed}")) for seed in (0, 1)]
    submission.show_order(points[:1])
    with pytest.raises(InputError, match=f"{refusal}. One command is one job array"):
        submission.show_order(points)


@pytest.fixture
def checkout(tmp_path):
    """A small repository of the project's shape, with a file that git ignores."""
    root = tmp_path / "checkout"
    for name in ("run_exp.py", "conf/a.yaml", "lora_one/b.py", "data/c.json", "docs/d.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / ".gitignore").write_text("results\n__pycache__\n")
    for command in (
        ["init", "--quiet"],
        ["add", "."],
        ["-c", "user.name=x", "-c", "user.email=x@y", "commit", "--quiet", "-m", "first"],
    ):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    (root / "lora_one" / "__pycache__").mkdir()
    (root / "lora_one" / "__pycache__" / "b.pyc").write_text("")
    return root


def test_a_snapshot_holds_what_a_run_executes_and_knows_its_commit(checkout):
    (checkout / "lora_one" / "new.py").write_text("not added yet")
    program = take_snapshot(checkout / "run_exp.py", checkout / "results")
    files = {str(f.relative_to(program.parent)) for f in program.parent.rglob("*") if f.is_file()}
    code = {"run_exp.py", "conf/a.yaml", "lora_one/b.py", "lora_one/new.py", "data/c.json"}
    assert files == {*code, "source.json"}
    # Also though it lies in the checkout, which goes on without it.
    before = commit(checkout)
    (checkout / "lora_one" / "b.py").write_text("changed")
    assert commit(checkout) == before | {"dirty": True}
    assert commit(program.parent) == before
    assert (program.parent / "lora_one" / "b.py").read_text() == "lora_one/b.py"


def test_equal_code_is_one_snapshot_and_other_code_another(checkout):
    first = take_snapshot(checkout / "run_exp.py", checkout / "results")
    assert take_snapshot(checkout / "run_exp.py", checkout / "results") == first
    (checkout / "conf" / "a.yaml").write_text("changed")
    assert take_snapshot(checkout / "run_exp.py", checkout / "results") != first
    assert len(list((checkout / "results").iterdir())) == 2


def test_a_snapshot_that_was_changed_is_not_used(checkout):
    program = take_snapshot(checkout / "run_exp.py", checkout / "results")
    (program.parent / "lora_one" / "b.py").write_text("changed")
    with pytest.raises(InputError, match="has been changed since it was made"):
        take_snapshot(checkout / "run_exp.py", checkout / "results")


def test_a_folder_without_history_has_a_snapshot_too(checkout, tmp_path):
    plain = tmp_path / "plain"
    for name in ("conf", "lora_one", "data", "run_exp.py"):
        plain.mkdir(exist_ok=True)
        (checkout / name).rename(plain / name)
    program = take_snapshot(plain / "run_exp.py", tmp_path / "snapshots")
    assert commit(program.parent) is None
    assert not list(program.parent.rglob("__pycache__"))
    assert (program.parent / "data" / "c.json").is_file()


RUN_ENDS = [
    ("FAILED", FAILED, None, FAILED, "failed (FAILED)"),
    ("FAILED", BAD_INPUT, None, BAD_INPUT, "bad input (FAILED)"),
    ("FAILED", TRY_AGAIN, "preempted", TRY_AGAIN, "preempted (FAILED)"),
    ("FAILED", TRY_AGAIN, "running", TRY_AGAIN, "left to another process (FAILED)"),
    # What stands there is of an earlier attempt: this one failed before it could write.
    ("FAILED", FAILED, "preempted", FAILED, "failed (FAILED)"),
    ("OUT_OF_MEMORY", None, "running", FAILED, "failed (OUT_OF_MEMORY)"),
    ("TIMEOUT", None, "running", FAILED, "failed (TIMEOUT)"),
    ("TIMEOUT", None, "preempted", TRY_AGAIN, "preempted (TIMEOUT)"),
    ("CANCELLED", None, None, TRY_AGAIN, "cancelled (CANCELLED)"),
    ("COMPLETED", DONE, "finished", DONE, "finished"),
    # SLURM has forgotten the job, and the run did not get to its end.
    (None, None, "running", FAILED, "failed (unknown to SLURM by now)"),
    (None, None, "finished", DONE, "finished"),
]


@pytest.mark.parametrize(("state", "status", "recorded", "expected", "word"), RUN_ENDS)
def test_a_job_that_is_over_is_judged_by_its_run(
    small, monkeypatch, capsys, tmp_path, state, status, recorded, expected, word
):
    config = small()
    stderr = tmp_path / "7_log.err"
    stderr.write_text("the last words\n")
    task = watch.Task("7", run_id(config), config, stderr)
    if recorded is not None:
        task.folder.mkdir(parents=True)
        (task.folder / "run.json").write_text(json.dumps({"status": recorded}))
    answer = {} if state is None else {"7": queue.Job(state, "", status)}
    monkeypatch.setattr(watch, "ask", lambda _: answer)
    monkeypatch.setattr(watch, "DELAY_S", 0)
    assert watch.watch([task], poll_s=0.01) == expected
    said = capsys.readouterr().out
    assert f"7 {word}" in said
    assert ("the last words" in said) == (expected != DONE)


def test_slurm_may_be_silent_for_a_while_but_not_for_ever(small, monkeypatch, capsys, tmp_path):
    config = small()
    task = watch.Task("7", run_id(config), config, tmp_path / "none")
    answers = [queue.QueueError("down"), {"7": queue.Job("FAILED", "", FAILED)}]

    def ask(_):
        answer = answers.pop(0) if answers else queue.QueueError("down")
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(watch, "ask", ask)
    assert watch.watch([task], poll_s=0.01) == FAILED
    monkeypatch.setattr(watch, "SILENCE_S", 0.05)
    assert watch.watch([task], poll_s=0.01) == TRY_AGAIN
    assert "SLURM does not answer (down)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "file",
    [
        "accelerate_config.yaml",
        *sorted(str(f) for f in (ROOT / "accelerate_configs").glob("*.yaml")),
    ],
)
def test_every_accelerate_file_is_one_that_accelerate_reads(file):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / file))
    assert config.num_processes > 1

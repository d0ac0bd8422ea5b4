"""Asked to stop, a run finishes its step, keeps it, says so, and goes on when started again."""

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from lora_one.errors import PreemptedError
from lora_one.harness.config.schema import PreemptionConfig
from lora_one.harness.distributed.peers.ending import Ending, close_all
from lora_one.harness.records.record import RunRecord
from lora_one.harness.resuming import preemption, time_limit
from lora_one.harness.resuming.preemption import Reason

from .long_run import attempts_of, overrides_of, result_of

# Long enough to be met in the middle; only the stop itself writes a checkpoint.
LONG = ["model.epochs=12", "checkpoints.every_steps=null", "checkpoints.every_seconds=600"]


@pytest.fixture(autouse=True)
def _same_handlers_afterwards():
    before = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(forks, llama_folder, rows_folder, tmp_path_factory):
    """The run that nobody stops."""
    place = tmp_path_factory.mktemp("whole")
    child = forks.start(*overrides_of(llama_folder, rows_folder, place, *LONG))
    assert child.wait() == 0, child.said
    (folder,) = place.glob("arithmetic-*")
    return result_of(folder)


def record_of(place: Path) -> dict:
    (file,) = place.glob("*/run.json")
    return json.loads(file.read_text())


def steps_logged(place: Path) -> int:
    files = list(place.glob("*/metrics.jsonl"))
    return len(files[0].read_text().splitlines()) if files else 0


def wait_for_steps(child, place: Path) -> None:
    while steps_logged(place) < 6:
        assert child.running(), child.said
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_in_training_keeps_the_step_and_the_same_command_goes_on(
    forks, llama_folder, rows_folder, tmp_path, whole, number
):
    command = overrides_of(llama_folder, rows_folder, tmp_path, *LONG)
    child = forks.start(*command)
    wait_for_steps(child, tmp_path)
    child.kill(number)
    child.kill(number)  # schedulers do that
    assert child.wait() == 75, child.said
    record = record_of(tmp_path)
    (checkpoint,) = tmp_path.glob("*/checkpoints/step-*")
    step = int(checkpoint.name.removeprefix("step-"))
    words = f"{number.name}; stopped after step {step}; the same command goes on from there"
    assert f"preempted: {words}\n" in child.said
    assert record["status"] == "preempted"
    requeues = number != signal.SIGTERM
    assert record["preempted"] == {"reason": words, "requeues": requeues, "phase": "train"}

    child = forks.start(*command)
    assert child.wait() == 0, child.said
    assert child.said.count(f"resuming from step {step}\n") == 1
    (folder,) = tmp_path.glob("arithmetic-*")
    assert result_of(folder) == whole
    assert [(a["status"], a["from_step"]) for a in attempts_of(tmp_path)] == [
        ("preempted", 0),
        ("finished", step),
    ]


def test_a_validation_that_the_stop_left_undone_is_made_up(
    small, run, tmp_path, monkeypatch, forks, llama_folder, rows_folder, whole
):
    """The request comes in the very step after which a validation is due."""
    command = overrides_of(llama_folder, rows_folder, tmp_path, *LONG)
    with pytest.raises(PreemptedError), preemption.listening():
        original = preemption.requested
        asked = iter([None, Reason.SIGUSR1])
        monkeypatch.setattr(preemption, "requested", lambda: next(asked, original()))
        from lora_one.harness.config.compose import compose_config, composer

        with composer(Path(__file__).parents[2] / "conf"):
            config = compose_config(command)
        run(config)
    monkeypatch.undo()
    assert record_of(tmp_path)["attempts"][-1]["step"] == 2
    assert forks.start(*command).wait() == 0
    (folder,) = tmp_path.glob("arithmetic-*")
    assert result_of(folder) == whole


def test_a_signal_outside_training_ends_the_run_at_once(forks, llama_folder, rows_folder, tmp_path):
    command = overrides_of(llama_folder, rows_folder, tmp_path, "dataset.test_rows=6")
    slow = [*command, "dataset.max_new_tokens=120", "evaluation.batch_size=1"]
    child = forks.start(*slow)
    while not list(tmp_path.glob("*/predictions.jsonl.part-0")):
        assert child.running(), child.said
    child.kill(signal.SIGTERM)
    assert child.wait() == 75, child.said
    record = record_of(tmp_path)
    assert (record["status"], record["preempted"]["phase"]) == ("preempted", "eval")
    child = forks.start(*slow)
    assert child.wait() == 0
    # Trained already: the checkpoint of the last step has it all.
    assert child.said.count("resuming from step 10\n") == 1
    assert record_of(tmp_path)["attempts"][-1]["from_step"] == 10


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_request_that_did_not_get_through_is_raised_at_the_next_phase(small):
    class Dying:
        def __del__(self):  # an error here goes no farther
            signal.raise_signal(signal.SIGTERM)

    record = RunRecord(small()).open()
    with preemption.listening():
        Dying()
        with pytest.raises(PreemptedError, match="SIGTERM"), record.phase("eval"):
            pass


@pytest.mark.parametrize("kind", ["PreemptedError", "KeyboardInterrupt"])
def test_a_stop_of_another_rank_is_recorded_as_one_of_this_rank(kind, small):
    """A sweep reads there that its point was asked to stop, and stops as well."""
    record = RunRecord(small()).open()
    with record.closing():
        close_all(Ending(1, "other", 75, "preempted", kind, "SIGTERM; go on", ""), show=False)
    found = json.loads((record.folder / "run.json").read_text())
    asked = kind == "PreemptedError"
    assert (found["status"], "error" in found) == ("preempted", not asked)
    assert found.get("preempted", {}).get("reason") == ("SIGTERM; go on" if asked else None)


def test_ctrl_c_is_an_interruption(forks, llama_folder, rows_folder, tmp_path):
    child = forks.start(*overrides_of(llama_folder, rows_folder, tmp_path, *LONG))
    wait_for_steps(child, tmp_path)
    child.kill(signal.SIGINT)
    assert child.wait() == 130
    assert record_of(tmp_path)["status"] == "preempted"


@pytest.mark.slow
def test_a_sweep_passes_the_signal_on_and_stops(forks, llama_folder, rows_folder, tmp_path):
    command = overrides_of(llama_folder, rows_folder, tmp_path, *LONG)
    child = forks.start("-m", *command, "seed=0,1")
    child.wait_for("train:", 120)
    child.kill(signal.SIGUSR1)
    assert child.wait() == 75, child.said
    assert "[2/2]" not in child.said
    assert record_of(tmp_path)["status"] == "preempted"


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_two_ranks_stop_at_the_same_step_when_one_is_asked(
    forks, llama_folder, rows_folder, tmp_path
):
    """Also in the second epoch, whose order of rows both have to find again."""

    def start(place: Path):
        port = free_port()
        two = [*LONG, "model.per_device_batch_size=1", "model.epochs=4"]
        command = overrides_of(llama_folder, rows_folder, place, *two)
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            forks.start(*command, RANK=f"{rank}", LOCAL_RANK=f"{rank}", **world) for rank in (0, 1)
        ]

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert [child.wait() for child in start(whole)] == [0, 0]
    ranks = start(parts)
    wait_for_steps(ranks[0], parts)
    ranks[1].kill(signal.SIGUSR1)
    assert [child.wait() for child in ranks] == [75, 75]
    record = record_of(parts)
    assert record["status"] == "preempted"
    assert record["preempted"]["reason"].startswith("SIGUSR1; stopped after step ")
    assert [child.wait() for child in start(parts)] == [0, 0]
    (left,), (expected,) = parts.glob("arithmetic-*"), whole.glob("arithmetic-*")
    assert result_of(left) == result_of(expected)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand in for SLURM's commands: squeue says the end, scontrol writes down what it is told."""
    for name, line in {
        "squeue": f'echo "$@" > {tmp_path}/asked; cat {tmp_path}/end',
        "scontrol": f'echo "$@" >> {tmp_path}/told; test -z "$REFUSED" || (echo no >&2; exit 1)',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    others = ("SLURM_JOB_END_TIME", "SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "LORA_ONE_SWEEP")
    for name in others:
        monkeypatch.delenv(name, raising=False)

    def ends_in(seconds: float) -> None:
        local = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds))
        (tmp_path / "end").write_text(local + "\n")

    ends_in(3600)
    return ends_in


def told(tmp_path: Path) -> str:
    return (tmp_path / "told").read_text() if (tmp_path / "told").exists() else ""


def test_a_time_limit_that_is_close_stops_the_run(slurm):
    slurm(30)
    with (
        pytest.raises(PreemptedError, match="the job's time limit is close") as caught,
        preemption.listening(),
        preemption.watching(60),
    ):
        time.sleep(20)
    assert caught.value.requeues


def test_a_limit_that_was_raised_is_heeded(slurm, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1))
    slurm(3600)
    over = threading.Event()
    threading.Timer(1.5, over.set).start()
    assert not time_limit.wait_until_close(5, over)


def test_a_job_that_is_over_limits_nobody(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) - 3600))
    (tmp_path / "end").write_text("slurm_load_jobs error: Invalid job id specified")
    over = threading.Event()
    threading.Timer(0.2, over.set).start()
    assert not time_limit.wait_until_close(5, over)


@pytest.mark.parametrize("answer", ["N/A", "", "slurm_load_jobs error"])
def test_a_limit_that_slurm_does_not_say_is_none(slurm, tmp_path, answer):
    (tmp_path / "end").write_text(answer)
    assert time_limit.ask_for_end() is None


def preempt(*, requeues: bool = True, **settings) -> None:
    defaults = {"margin_seconds": 0, "requeue": True, "max_requeues": 2, "max_attempts": 5}
    with (
        pytest.raises(PreemptedError),
        time_limit.requeueing(PreemptionConfig(**defaults | settings)),
    ):
        raise PreemptedError("asked", requeues=requeues)


def test_a_preempted_job_is_requeued_a_bounded_number_of_times(
    slurm, tmp_path, monkeypatch, capsys
):
    preempt()
    assert told(tmp_path) == "requeue 7\n"
    assert "requeueing job 7, 1 of at most 2 times" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    preempt()
    assert told(tmp_path) == "requeue 7\n"
    assert "requeued 2 times" in capsys.readouterr().out


def test_the_last_task_of_an_array_does_not_speak_for_the_array(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    preempt()
    assert told(tmp_path) == "requeue 7_2\n"
    assert time_limit.ask_for_end() is not None
    assert "--jobs 7_2 " in (tmp_path / "asked").read_text()


def test_who_must_not_requeue_does_not(slurm, tmp_path, monkeypatch):
    preempt(requeues=False)  # SIGTERM, as scancel sends it
    preempt(requeue=False)
    with monkeypatch.context() as point:
        point.setenv("LORA_ONE_SWEEP", "abc")
        preempt()
    with monkeypatch.context() as second:
        second.setenv("RANK", "1")
        preempt()
    monkeypatch.delenv("SLURM_JOB_ID")
    preempt()
    assert told(tmp_path) == ""


def test_a_requeue_that_slurm_refuses_is_a_warning(slurm, monkeypatch, capsys):
    monkeypatch.setenv("REFUSED", "1")
    preempt()
    assert "warning: job 7 could not be requeued: no\n" in capsys.readouterr().out


def test_after_scancel_a_job_stays_away_whatever_was_asked_before():
    with pytest.raises(PreemptedError) as caught, preemption.listening(), preemption.deferred():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR2)
    assert not caught.value.requeues

"""Sweeps over one folder share the work, and do nothing twice."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_one.harness.records.lease import EXPIRY_VARIABLE, look

ROOT = Path(__file__).parents[2]
LIGHT = Path(__file__).with_name("light_run.py")

pytestmark = pytest.mark.slow


class Place:
    """A results folder, and the processes that work at it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results = folder, folder / "results"
        self.processes = []

    def start(self, *arguments: str, program: Path = LIGHT, **environment: str):
        process = subprocess.Popen(
            [sys.executable, str(program), *arguments, f"output_dir={self.results}"],
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "LIGHT_RUNS": str(self.folder), "HF_HUB_OFFLINE": "1"}
            | {EXPIRY_VARIABLE: "6"}
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def tell(self, *names: str) -> None:
        for name in names:
            (self.folder / name).touch()

    def starts(self) -> list[int]:
        """The seeds of the runs that were started, in order."""
        return [int(line.split()[0]) for line in (self.folder / "starts").read_text().splitlines()]

    def records(self) -> dict[str, str]:
        files = self.results.glob("*/run.json")
        return {file.parent.name: json.loads(file.read_text())["status"] for file in files}

    def leases(self) -> list:
        return [look(folder).holder for folder in (self.results / "leases").iterdir()]


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    yield place
    for process in place.processes:
        process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen, text: str) -> str:
    """Read what a process says up to the line that holds ``text``."""
    said = ""
    for line in process.stdout:
        said += line
        if text in line:
            return said
    raise AssertionError(f"{text!r} was not said:\n{said}{process.stderr.read()}")


def test_two_concurrent_sweeps_of_12_points_are_12_runs_each_once(place):
    place.tell("hold-0")
    sweeps = [place.start("-m", "seed=range(12)") for _ in range(2)]
    time.sleep(3)  # so that one of them meets a point that the other holds
    (place.folder / "hold-0").unlink()
    for sweep in sweeps:
        said, errors = sweep.communicate(timeout=240)
        assert sweep.returncode == 0, errors
        row = next(line for line in said.splitlines() if line.startswith("lora_one"))
        assert row.split()[3] == "12"
        assert "not in the table" not in said
    assert sorted(place.starts()) == list(range(12))
    assert list(place.records().values()) == ["finished"] * 12
    assert place.leases() == [None] * 12
    leftovers = [file for file in place.results.rglob("*") if file.name.startswith(".")]
    assert leftovers == []
    (plan,) = (place.results / "sweeps").glob("*.json")
    points = json.loads(plan.read_text())["points"]
    assert {point["run_id"] for point in points} == set(place.records())
    assert {line.split()[3] for line in (place.folder / "starts").read_text().splitlines()} == {
        plan.stem
    }


def test_a_sweep_waits_for_a_point_of_another_and_does_it_if_that_one_dies(place):
    place.tell("hold-0")
    first = place.start("-m", "seed=0,1,2")
    wait_for(first, "running 0")
    second = place.start("-m", "seed=0,1,2")
    said = wait_for(second, "waiting for 1 point, being done by")
    point = int(re.search(r"process (\d+)$", said.splitlines()[-1])[1])
    assert re.search(r"\[1/3\] \S+-s0-\S+: being done by .*; later", said)
    assert place.starts() == [0, 1, 2]
    first.kill()
    os.kill(point, signal.SIGKILL)
    (place.folder / "hold-0").unlink()
    said, errors = second.communicate(timeout=180)
    assert second.returncode == 0, errors
    assert place.starts() == [0, 1, 2, 0]
    assert list(place.records().values()) == ["finished"] * 3
    assert next(line for line in said.splitlines() if line.startswith("lora_one")).split()[3] == "3"


def test_a_point_that_failed_in_another_sweep_is_not_done_twice(place):
    place.tell("hold-0", "fail-0")
    first = place.start("-m", "seed=0,1")
    wait_for(first, "running 0")
    second = place.start("-m", "seed=0,1")
    wait_for(second, "waiting for 1 point")
    (place.folder / "hold-0").unlink()
    said, _ = second.communicate(timeout=180)
    assert first.wait(timeout=180) == second.returncode == 1
    assert "failed meanwhile, and is not done twice" in said
    assert place.starts() == [0, 1]
    # The same command, given later, is another attempt.
    (place.folder / "fail-0").unlink()
    third = place.start("-m", "seed=0,1")
    assert third.wait(timeout=180) == 0
    assert place.starts() == [0, 1, 0]


def test_a_sweep_that_is_asked_to_stop_asks_its_point_and_stops_after_it(place):
    place.tell("hold-0")
    sweep = place.start("-m", "seed=0,1")
    wait_for(sweep, "running 0")
    waiting = place.start("-m", "seed=0")
    wait_for(waiting, "waiting for 1 point")
    for process, number in ((waiting, signal.SIGTERM), (sweep, signal.SIGUSR1)):
        process.send_signal(number)
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 75
        assert "preempted: " in errors
        assert "the same command does the rest" in errors
        assert "0 of " in errors
    assert place.starts() == [0]
    assert list(place.records().values()) == ["preempted"]
    assert place.leases() == [None]
    (place.folder / "hold-0").unlink()
    assert place.start("-m", "seed=0,1").wait(timeout=180) == 0
    assert place.starts() == [0, 0, 1]


def test_a_place_that_is_no_folder_is_one_message(place):
    place.results.touch()
    sweep = place.start("-m", "seed=0,1")
    _, errors = sweep.communicate(timeout=180)
    assert sweep.returncode == 2
    assert "Not a directory. Choose another folder with output_dir=<folder>." in errors
    assert not (place.folder / "starts").exists()


@pytest.fixture
def tiny_run(llama_folder, rows_folder):
    return [
        *(f"model.name={llama_folder}", f"dataset.path={rows_folder}", "dataset.max_new_tokens=4"),
        *("dataset.train_rows=16", "peft.lora_r=4", "init=lora"),
    ]


def test_of_two_commands_for_one_run_one_runs_and_the_other_touches_nothing(place, tiny_run):
    endless = [*tiny_run, "model.epochs=100000", "model.max_steps=100000"]
    first = place.start(*endless, program=ROOT / "run_exp.py")
    wait_for(first, "train:")
    (folder,) = place.results.glob("arithmetic-*")
    logged = (folder / "metrics.jsonl").read_text()
    second = place.start(*endless, program=ROOT / "run_exp.py")
    _, errors = second.communicate(timeout=180)
    assert second.returncode == 75
    (told,) = (line for line in errors.splitlines() if line.startswith("not done: "))
    assert f"another process is doing {folder.name}: " in told
    assert f"process {first.pid}, since " in told
    assert "last heartbeat" in told
    # The first one went on meanwhile.
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["process"]["pid"]) == ("running", first.pid)
    assert (folder / "metrics.jsonl").read_text().startswith(logged)
    assert first.poll() is None
    assert look(place.results / "leases" / folder.name).holder.pid == first.pid


def test_two_concurrent_sweeps_of_real_runs(place, tiny_run):
    sweep = ["-m", *tiny_run, "model.max_steps=1", "seed=0,1,2"]
    both = [place.start(*sweep, program=ROOT / "run_exp.py") for _ in range(2)]
    said = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum(out.count("done: accuracy") - out.count("already done:") for out, _ in said) == 3
    assert list(place.records().values()) == ["finished"] * 3
    assert place.leases() == [None] * 3
    for out, _ in said:
        row = next(line for line in out.splitlines() if line.startswith("lora "))
        assert row.split()[3] == "3"

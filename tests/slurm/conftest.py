"""A SLURM to test with: the one that answers here, else one of our own, else a reason why not."""

import fcntl
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest

from .cluster import Submission, call, script


@pytest.fixture(scope="session", autouse=True)
def slurm() -> Iterator[None]:
    """Find a SLURM or start one; the last of the test processes stops the one that was started."""
    with Path(tempfile.gettempdir(), "lora-one-slurm-tests").open("a+") as users:
        if _alone(users):
            users.truncate(0)  # what a killed process has left
        fcntl.flock(users, fcntl.LOCK_SH)
        if script("status", 60).returncode:
            users.write("started\n")
            users.flush()
        answer = script("start", 480)
        if answer.returncode:
            pytest.skip(f"no SLURM to test with: {answer.stderr.strip() or answer.stdout.strip()}")
        yield
        users.seek(0)
        if _alone(users) and users.read():
            script("stop", 120)
            users.truncate(0)


def _alone(users: TextIO) -> bool:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@pytest.fixture
def results(tmp_path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def tiny(results) -> list[str]:
    """Two steps with the embedded model on a few rows."""
    return [
        f"output_dir={results}",
        *["dataset.train_rows=16", "dataset.validation_rows=8", "dataset.test_rows=4"],
        *["dataset.max_new_tokens=4", "evaluation.batch_size=8", "init.bsz=2", "init.iters=2"],
        *["model.max_steps=2", "model.real_batch_size=8", "model.per_device_batch_size=4"],
    ]


@pytest.fixture
def long(tiny) -> list[str]:
    """Some seconds of training, so that something can happen in the middle."""
    steps = ["model.max_steps=200", "model.epochs=1000", "model.logging_steps=1"]
    return [*tiny, *steps, "model.eval_epochs=1000", "model.real_batch_size=4"]


@pytest.fixture
def submit(results) -> Iterator[Callable[..., Submission]]:
    """Submit jobs and wait; what is left of them at the end of the test is cancelled."""
    submissions: list[Submission] = []

    def start(*overrides: str) -> Submission:
        submissions.append(Submission(overrides, results))
        return submissions[-1]

    yield start
    for submission in submissions:
        submission.command.kill()
        submission.command.wait()
        call("scancel", "--quiet", submission.job)

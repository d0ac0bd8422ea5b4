"""What SLURM says of jobs. By ``squeue`` alone: clusters without accounting have no ``sacct``."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

# States of a job that is waiting, at work, or about to be requeued.
LIVE = {
    "PENDING",
    "RUNNING",
    "COMPLETING",
    "CONFIGURING",
    "SUSPENDED",
    "STOPPED",
    "SIGNALING",
    "STAGE_OUT",
    "RESIZING",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "RESV_DEL_HOLD",
    "SPECIAL_EXIT",
}
PATIENCE_S = 60
"""How long one question may take."""


class QueueError(RuntimeError):
    """SLURM did not answer; the message is its own."""


@dataclass(frozen=True)
class Job:
    """One task of an array, or a job of its own.

    Attributes:
        state: SLURM's word for it, such as ``RUNNING``.
        reason: Why it waits, or has ended.
        status: Exit status of the run; None as long as it is not over, and where something else
            ended it.
        logs: Name of the folder of its error output.
    """

    state: str
    reason: str
    status: int | None
    logs: str = ""

    @property
    def live(self) -> bool:
        """Tell whether it may still do something."""
        return self.state in LIVE


def ask(number: str) -> dict[str, Job]:
    """Ask for a job, or for all tasks of an array: ``12_3`` -> what it does.

    SLURM forgets a job some minutes after its end (``MinJobAge``); it is then missing.

    Raises:
        QueueError: SLURM does not answer.
    """
    fields = "JobArrayID:|,State:|,Reason:|,exit_code:|,STDERR:|"
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={number}"]
    try:
        answer = subprocess.run(
            [*command, f"--Format={fields}"],
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )
    except subprocess.TimeoutExpired as error:
        raise QueueError(f"squeue has not answered for {PATIENCE_S} s") from error
    if "Invalid job id" in answer.stderr:
        return {}
    if answer.returncode:
        raise QueueError(answer.stderr.strip() or f"squeue ended with status {answer.returncode}")
    return dict(map(_read, filter(None, answer.stdout.splitlines())))


def _read(line: str) -> tuple[str, Job]:
    name, state, reason, code, stderr = line.removesuffix("|").split("|", 4)
    # A job that reached its time limit, or was cancelled, has a status that it did not choose.
    chosen = state in ("COMPLETED", "FAILED") and os.WIFEXITED(int(code))
    status = os.WEXITSTATUS(int(code)) if chosen else None
    return name, Job(state, "" if reason == "None" else reason, status, Path(stderr).parent.name)

"""Wait until the jobs of a submission are over, and tell how each of them ended.

A run is judged by its ``run.json``, a job by the queue. No result file of submitit is waited for:
a task that was killed leaves none.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_one.harness.config.schema import Config
from lora_one.harness.console import say
from lora_one.harness.exit_status import BAD_INPUT, DONE, FAILED, TRY_AGAIN
from lora_one.harness.records.folder import finished_record, read_record
from lora_one.harness.slurm.queue import Job, QueueError, ask

SILENCE_S = 900
"""How long SLURM may fail to answer before the command gives up; the jobs do not."""
DELAY_S = 30
"""How long a file that another node wrote may take to be seen here (NFS caches attributes)."""
LAST_LINES = 15


@dataclass(frozen=True)
class Task:
    """One run and the job that does it.

    Attributes:
        job: As SLURM calls it, ``12_3``.
        run: Its run id.
        config: Its configuration.
        stderr: Where rank 0 of the job leaves its error output.
    """

    job: str
    run: str
    config: Config
    stderr: Path

    @property
    def number(self) -> str:
        """The number of the job, or of the array that it is part of."""
        return self.job.partition("_")[0]

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.output_dir) / self.run


def watch(tasks: Sequence[Task], poll_s: float) -> int:
    """Wait for the end of all tasks and print what becomes of them.

    Returns:
        0 if every run is finished; else 1 if one failed, 2 if one was given bad input, and 75 if
        all that are left were preempted, cancelled, or done by somebody else, or if SLURM has not
        answered for a quarter of an hour.
    """
    ended: dict[str, int] = {}
    seen: dict[str, str] = {}
    answered = time.monotonic()
    while True:
        try:
            left = dict.fromkeys(task.number for task in tasks if task.job not in ended)
            queue = {name: job for number in left for name, job in ask(number).items()}
            answered = time.monotonic()
        except QueueError as error:
            if time.monotonic() - answered > SILENCE_S:
                say(
                    f"SLURM does not answer ({error}). The jobs may still run: given again, the "
                    "same command waits for them."
                )
                return TRY_AGAIN
        else:
            for task in tasks:
                job = queue.get(task.job)
                if task.job in ended:
                    continue
                if job is not None and job.live:
                    _tell_progress(task, job, seen)
                else:
                    ended[task.job] = _judge(task, job)
        if len(ended) == len(tasks):
            return next(
                (status for status in (FAILED, BAD_INPUT, TRY_AGAIN) if status in ended.values()),
                DONE,
            )
        time.sleep(poll_s)


def _tell_progress(task: Task, job: Job, seen: dict[str, str]) -> None:
    """Print a change of a job's state; reasons for waiting change too often to be told."""
    before = seen.get(task.job)
    seen[task.job] = job.state
    if job.state == "PENDING" and before is None:
        say(f"{task.job} waits{f' ({job.reason})' if job.reason else ''}: {task.run}")
    elif job.state == "PENDING" and before != "PENDING":
        say(f"{task.job} was requeued: {task.run}")
    elif job.state == "RUNNING" and before != "RUNNING":
        say(f"{task.job} runs: {task.run}")


def _judge(task: Task, job: Job | None) -> int:
    """Say how a run ended whose job is over; None: SLURM does not know the job any more."""
    waited = time.monotonic()
    while not finished_record(task.config):
        said_done = job is None or job.status == DONE
        if not said_done or time.monotonic() - waited > DELAY_S:
            return _explain(task, job)
        time.sleep(1)
    say(f"{task.job} finished: {task.run}")
    return DONE


def _explain(task: Task, job: Job | None) -> int:
    """Tell why a run is not finished, with the end of its error output."""
    status = None if job is None else job.status
    record = read_record(task.folder) or {}
    if status == BAD_INPUT:
        word = "bad input"
    elif job is not None and job.state == "CANCELLED":
        word, status = "cancelled", TRY_AGAIN
    elif status == TRY_AGAIN and record.get("status") == "running":
        word = "left to another process"
    elif status == TRY_AGAIN or (status is None and record.get("status") == "preempted"):
        word, status = "preempted", TRY_AGAIN
    else:
        word, status = "failed", FAILED
    state = "unknown to SLURM by now" if job is None else job.state
    say(f"{task.job} {word} ({state}): {task.run}")
    for line in _end_of(task.stderr):
        say(f"    {line}")
    say(f"    all of it: {task.stderr}")
    return status


def _end_of(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ["(it left no error output)"]
    return [line for line in lines if line.strip()][-LAST_LINES:]

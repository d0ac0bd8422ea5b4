"""When SLURM ends this job, and how to let it come back; imports no torch."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from lora_one.errors import PreemptedError
from lora_one.harness.config.schema import PreemptionConfig
from lora_one.harness.console import say
from lora_one.harness.distributed.ranks import is_main

# SLURM is asked so often, since limits change; its administrators dislike more.
ASK_EVERY = 300.0
PATIENCE = 20.0


def wait_until_close(margin_seconds: float, over: threading.Event) -> bool:
    """Wait until the job's end is closer than the margin; False if ``over`` was set before.

    Before the wait ends SLURM is asked once more: the limit may have been raised.
    """
    end = _end_in_environment()
    while not over.is_set():
        end = ask_for_end() or end
        left = ASK_EVERY if end is None else end - margin_seconds - time.time()
        if left <= 0:
            return not over.is_set()
        over.wait(min(left, ASK_EVERY))
    return False


def ask_for_end() -> float | None:
    """Ask SLURM when this job ends, in seconds since 1970; None where it does not say."""
    command = ["squeue", "--noheader", "--jobs", _this_job(), "--format", "%e"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=PATIENCE
        )
        # Local time, as SLURM prints it.
        return datetime.fromisoformat(answer.stdout.strip()).timestamp()
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _this_job() -> str:
    """Name this job, and no other, to SLURM's commands.

    The last task of an array has the number of the array, which stands for all of its tasks.
    """
    job = os.environ["SLURM_JOB_ID"]
    is_array = job == os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{job}_{os.environ['SLURM_ARRAY_TASK_ID']}" if is_array else job


def _end_in_environment() -> float | None:
    given = os.environ.get("SLURM_JOB_END_TIME", "")
    # A shell that has outlived its job keeps the job's variables.
    return float(given) if given.isdecimal() and float(given) > time.time() else None


@contextmanager
def requeueing(settings: PreemptionConfig) -> Iterator[None]:
    """Let SLURM start this job again after a preemption, where that is wanted and possible.

    Only the topmost process of a job does so, on rank 0.
    """
    try:
        yield
    except PreemptedError as error:
        if error.requeues and settings.requeue and _is_topmost():
            _requeue(settings.max_requeues)
        raise


def _is_topmost() -> bool:
    return "SLURM_JOB_ID" in os.environ and "LORA_ONE_SWEEP" not in os.environ and is_main()


def _requeue(limit: int) -> None:
    job, restarts = _this_job(), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if restarts >= limit:
        say(
            f"warning: job {job} was requeued {restarts} times, preemption.max_requeues={limit}; "
            "submit it again to go on"
        )
        return
    # Said before, since SLURM ends this process at once.
    say(f"requeueing job {job}, {restarts + 1} of at most {limit} times")
    try:
        subprocess.run(
            ["scontrol", "requeue", job],
            capture_output=True,
            text=True,
            check=True,
            timeout=PATIENCE,
        )
    except subprocess.CalledProcessError as error:
        say(f"warning: job {job} could not be requeued: {error.stderr.strip()}")
    except (OSError, subprocess.SubprocessError) as error:
        say(f"warning: job {job} could not be requeued: {error}")

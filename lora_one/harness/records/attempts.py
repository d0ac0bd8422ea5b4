"""The attempts that a run has taken: who, when, how far, and whether the next one has a point."""

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_one.errors import InputError
from lora_one.evaluation.journal import is_part

Attempt = dict[str, Any]


def earlier_attempts(record: dict[str, Any] | None, folder: Path) -> list[Attempt]:
    """Return the attempts of an unfinished run's record, the last one closed.

    Its process is gone, so what it did not write down itself is written for it: that it was killed,
    and how many bytes of replies it left.
    """
    if record is None or record.get("status") == "finished":
        return []
    attempts = record.get("attempts") or []
    if attempts:
        last = attempts[-1]
        if last["status"] == "running":
            last["status"] = "killed"
        last["replies_bytes"] = sum(p.stat().st_size for p in folder.iterdir() if is_part(p))
    return attempts


def new_attempt(from_step: int) -> Attempt:
    """Describe the attempt that begins now."""
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "started": now(),
        "ended": None,
        "status": "running",
        "from_step": from_step,
        "step": from_step,
        "phase": None,
        "phases_entered": 0,
        "replies_bytes": 0,
    }


def require_progress(attempts: Sequence[Attempt], limit: int, folder: Path) -> None:
    """Refuse a run whose last attempts got no farther than the ones before.

    Farther is a newer checkpoint, then a later phase, then more replies.

    Raises:
        InputError: saying how to go on.
    """
    idle, best = 0, (-1, 0, 0)
    for attempt in attempts:
        reached = (attempt["step"], attempt["phases_entered"], attempt["replies_bytes"])
        idle = 0 if reached > best else idle + 1
        best = max(best, reached)
    if idle >= limit:
        last = attempts[-1]
        raise InputError(
            f"{folder}: {idle} attempts in a row made no progress; the last one ended as "
            f"'{last['status']}' in phase {last['phase']}, from step {last['from_step']}. See "
            f"run.json there. To try again, give preemption.max_attempts={2 * limit} (more memory, "
            "a longer job or shorter checkpoints.every_seconds may help), or remove the folder."
        )


def now() -> str:
    """Return the time as a record shows it."""
    return datetime.now(UTC).isoformat(timespec="seconds")

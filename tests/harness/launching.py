"""Starts the ranks of one command as ``srun`` would: bare processes that share a step."""

import os
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 300
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Answer:
    """How one rank ended, and what it said."""

    status: int
    out: str
    err: str


def step(rank: int, tasks: int, **more: str) -> dict[str, str]:
    """What SLURM tells one task of a step on one node."""
    return {
        "SLURM_JOB_ID": "41",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_TASKS_PER_NODE": str(tasks),
        "SLURM_STEP_NODELIST": "node7",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    } | more


def start(command: Sequence[str], tasks: int, **more: str) -> list[subprocess.Popen]:
    """Start ``python <command>`` once for each task; ``{rank}`` in it is the task's number."""
    outside = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    run = uuid.uuid4().hex
    return [
        subprocess.Popen(
            [sys.executable, *(part.replace("{rank}", str(rank)) for part in command)],
            env=outside
            | {"HF_HUB_OFFLINE": "1", "SLURM_CLUSTER_NAME": run}
            | step(rank, tasks, **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(tasks)
    ]


def finish(ranks: Sequence[subprocess.Popen], seconds: float = SECONDS) -> list[Answer]:
    """Wait for all ranks; none may take longer than ``seconds`` from now."""
    try:
        said = [rank.communicate(timeout=seconds) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [Answer(rank.returncode, *each) for rank, each in zip(ranks, said, strict=True)]


def srun(command: Sequence[str], tasks: int, **more: str) -> list[Answer]:
    """Run ``python <command>`` as the tasks of one step."""
    return finish(start(command, tasks, **more))

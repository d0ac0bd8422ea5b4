"""Compare the start-up of several ranks with that of one process, taking turns.

    python scripts/benchmark_startup.py                # two ranks, three turns
    python scripts/benchmark_startup.py --ranks 4 --turns 5

Start-up is the time from the start of the first process to a line of the command: ``composed``
(``--cfg job``: the ranks have met and agreed on the configuration, no torch) and ``training`` (the
embedded model and rows are loaded, the process group stands, the adapter has its start). The ranks
are bare processes with the variables of ``srun``, which itself is not measured.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What to ask, and the beginning of the line that ends the start-up.
STAGES = {"composed": (["--cfg", "job"], "dataset:"), "training": ([], "train:")}
TARGET = 2.0


def main() -> int:
    """Measure, print a table, return 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    print(
        f"{platform.node()}: {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python "
        f"{platform.python_version()}, torch {version('torch')}, {datetime.now(UTC):%d %B %Y}"
    )
    added = {}
    for stage, (flags, line) in STAGES.items():
        seconds: dict[int, list[float]] = {1: [], arguments.ranks: []}
        for _ in range(arguments.turns):
            for ranks, found in seconds.items():
                found.append(start(ranks, flags, line))
        one, several = (statistics.median(found) for found in seconds.values())
        added[stage] = several - one
        print(
            f"{stage:10s} one process {one:6.2f} s, {arguments.ranks} ranks {several:6.2f} s, "
            f"added {added[stage]:5.2f} s (median of {arguments.turns}; target {TARGET:g} s)"
        )
    return 0 if all(seconds <= TARGET for seconds in added.values()) else 1


def start(ranks: int, flags: list[str], line: str) -> float:
    """Return the seconds until rank 0 says ``line``; nothing is left of the run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "run_exp.py"), *flags]
        command += [f"output_dir={folder}", f"model.per_device_batch_size={8 // ranks}"]
        began = time.perf_counter()
        processes = [
            subprocess.Popen(
                command,
                env=os.environ | step(rank, ranks),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for rank in range(ranks)
        ]
        for said in processes[0].stdout:
            if said.startswith(line):
                break
        else:
            raise RuntimeError(f"{' '.join(command)}: ended before it said {line}")
        seconds = time.perf_counter() - began
        for process in processes:
            process.terminate()
        for process in processes:
            process.communicate()
    return seconds


def step(rank: int, tasks: int) -> dict[str, str]:
    """What SLURM tells a task of a step on one node."""
    return {
        "HF_HUB_OFFLINE": "1",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_TASKS_PER_NODE": str(tasks),
        "SLURM_STEP_NODELIST": platform.node(),
        "SLURM_NODEID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


if __name__ == "__main__":
    sys.exit(main())

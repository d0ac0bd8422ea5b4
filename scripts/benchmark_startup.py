"""Measure what start-up costs: the library's import, and several ranks against one process.

    python scripts/benchmark_startup.py                # two ranks, three turns
    python scripts/benchmark_startup.py --ranks 4 --turns 5
    python scripts/benchmark_startup.py --only library

The library's import is that of all its public names in a fresh process that has imported torch and
PEFT. A run's start-up is the time from the start of the first process to a line of the command:
``composed`` (``--cfg job``: the ranks have met and agreed on the configuration, no torch) and
``training`` (the embedded model and rows are loaded, the process group stands, the adapter has its
start). The ranks are bare processes with the variables of ``srun``, which itself is not measured.
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
LIBRARY_TARGET = 0.1
IMPORTS = """
import time
import torch, peft
began = time.perf_counter()
import lora_one
[getattr(lora_one, name) for name in lora_one.__all__]
print(time.perf_counter() - began)
"""


def main() -> int:
    """Measure, print a table, return 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", choices=["library", "ranks"])
    arguments = parser.parse_args()
    print(
        f"{platform.node()}: {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python "
        f"{platform.python_version()}, torch {version('torch')}, {datetime.now(UTC):%d %B %Y}"
    )
    met = True
    if arguments.only != "ranks":
        met = library(arguments.turns)
    if arguments.only != "library":
        met = compare_ranks(arguments.ranks, arguments.turns) and met
    return 0 if met else 1


def library(turns: int) -> bool:
    """Print the seconds that the library adds to torch and PEFT; tell if they are few enough."""
    line = [sys.executable, "-c", IMPORTS]
    found = [float(subprocess.check_output(line, cwd=ROOT, text=True)) for _ in range(turns)]
    seconds = statistics.median(found)
    print(
        f"library    all public names {seconds:.3f} s beyond torch and PEFT (median of {turns}; "
        f"target {LIBRARY_TARGET:g} s)"
    )
    return seconds <= LIBRARY_TARGET


def compare_ranks(ranks: int, turns: int) -> bool:
    """Print what several ranks add to the start-up of a run; tell if that is little enough."""
    added = {}
    for stage, (flags, line) in STAGES.items():
        seconds: dict[int, list[float]] = {1: [], ranks: []}
        for _ in range(turns):
            for count, found in seconds.items():
                found.append(start(count, flags, line))
        one, several = (statistics.median(found) for found in seconds.values())
        added[stage] = several - one
        print(
            f"{stage:10s} one process {one:6.2f} s, {ranks} ranks {several:6.2f} s, "
            f"added {added[stage]:5.2f} s (median of {turns}; target {TARGET:g} s)"
        )
    return all(seconds <= TARGET for seconds in added.values())


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

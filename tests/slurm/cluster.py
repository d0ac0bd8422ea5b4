"""How the tests talk to SLURM: commands with a time limit, and a submission to act upon."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "local_slurm.sh"
PROGRAM = [sys.executable, str(ROOT / "run_exp.py")]
# What the shell around the tests may have from a launcher would be taken for the test's own.
FOREIGN = re.compile("SLURM_|SBATCH_|SRUN_|LORA_ONE_|RANK$|LOCAL_RANK$|WORLD_SIZE$|MASTER_")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not FOREIGN.match(name)}
ENVIRONMENT |= {"HF_HUB_OFFLINE": "1"}
CPU = [
    "launcher=slurm_1gpu",
    *["launcher.gpus_per_node=0", "launcher.cpus_per_task=1", "launcher.mem_gb=null"],
    *["launcher.timeout_min=10", "launcher.signal_delay_s=60", "launcher.poll_s=1"],
]


def script(action: str, timeout: float) -> subprocess.CompletedProcess:
    command = [str(SCRIPT), action]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def call(*command: str, timeout: float = 180, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def wait_until(condition: Callable[[], object], timeout: float = 120) -> object:
    """Wait for something to become true, and return it."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)
    return value


def read_json(file: Path) -> dict:
    """Read a file that may be replaced, or not be there yet."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return {}


def records(results: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(results.glob("*/run.json"))]


class Submission:
    """A command that waits for its jobs, started in the background."""

    def __init__(self, overrides: Sequence[str], results: Path) -> None:
        self.results = results
        # Flags come first; the sort leaves the order of the overrides as it is.
        self.command = subprocess.Popen(
            [*PROGRAM, *sorted([*CPU, *overrides], key=lambda o: not o.startswith("-"))],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self.job = self.wait_for_line(r"submitted \d+ as job (\d+)")

    def wait_for_line(self, pattern: str) -> str:
        for line in self.command.stdout:
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found[1]
        pytest.fail(f"no line like {pattern} in:\n{''.join(self.lines)}")

    def wait_for_steps(self, count: int) -> None:
        def trained() -> bool:
            files = list(self.results.glob("*/metrics.jsonl"))
            return bool(files) and files[0].read_text().count('"learning_rate"') >= count

        wait_until(trained)

    def end(self, timeout: float = 240) -> tuple[int, str]:
        """Wait for the end of the command; its status and all that it said."""
        rest, _ = self.command.communicate(timeout=timeout)
        return self.command.returncode, "".join(self.lines) + rest

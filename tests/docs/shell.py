"""What a page's shell blocks call, told by the shell itself: programs are stubs that note it."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Programs of the system and of SLURM; what they are told is not checked.
SYSTEM = [
    "cmp",
    "git",
    "llama-cli",
    "ls",
    "pip",
    "pre-commit",
    "scontrol",
    "sleep",
    "squeue",
    "tail",
]
CHECKED = ("accelerate", "make", "python", "python3", "sbatch", "srun", "torchrun")
REAL = ("cat",)  # writes the scripts that a page shows
STUB = """#!/bin/bash
printf '%s\\0' "$#" "$BLOCK" "${0##*/}" "$@" >> "$CALLS"
if [ "${0##*/}" = ls ]; then printf '%s\\n' "${@: -1}"; fi
"""


@dataclass(frozen=True)
class Call:
    """A program, its arguments, and the block that calls it."""

    block: str
    program: str
    arguments: list[str]

    def __str__(self):
        return f"{self.block}: {' '.join([self.program, *self.arguments])}"


class Shell:
    """A folder with stubs for programs, in which blocks of shell are run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._calls = folder / "calls"
        self._programs = folder / "programs"
        for place in (self._programs, folder / ".venv" / "bin"):
            place.mkdir(parents=True)
            for name in (*SYSTEM, *CHECKED):
                self._stub(place / name)
        (folder / ".venv" / "bin" / "activate").touch()
        for name in REAL:
            (self._programs / name).symlink_to(f"/bin/{name}")

    def run(self, blocks: list[tuple[str, str]]) -> list[Call]:
        """Return what blocks (name, text) call, in one shell, so that variables live on.

        Raises:
            AssertionError: for a program that is not known, or a variable that is not set.
        """
        self._calls.write_bytes(b"")
        script = "\n".join(f"export BLOCK={name}\n{text}" for name, text in blocks)
        answer = subprocess.run(
            ["/bin/bash", "-eu", "-c", script],
            cwd=self.folder,
            env={"PATH": str(self._programs), "CALLS": str(self._calls), "HOME": os.devnull},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert answer.returncode == 0, f"{blocks[0][0]}: {answer.stderr}"
        return self._read()

    def _read(self) -> list[Call]:
        words = self._calls.read_bytes().decode().split("\0")[:-1]
        calls = []
        while words:
            count = int(words[0])
            calls.append(Call(words[1], words[2], words[3 : 3 + count]))
            words = words[3 + count :]
        return calls

    @staticmethod
    def _stub(file: Path) -> None:
        file.write_text(STUB)
        file.chmod(0o755)

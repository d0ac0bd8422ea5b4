"""Whether two LaTeX answers are equal as mathematics, judged by math-verify in processes of ours.

math-verify (Hugging Face) parses LaTeX and compares with SymPy. Its own time limit is a SIGALRM
handler: it works in the main thread only, replaces the handler of whoever calls, and cannot stop
one long operation inside a C library, such as the power tower that a model wrote. So comparisons
run in worker processes, one JSON line each way, with limits on memory and on processor time, which
unlike wall time is the same on a busy machine. What they end is undecided, and told from unequal.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any, Literal

from lora_one.errors import InputError
from lora_one.tasks.usable_cores import usable_cores

Compared = Literal["equal", "unequal", "timeout", "crashed"]
"""``timeout``: past ``SECONDS_PER_PAIR``. ``crashed``: past the limit on memory, or another end."""

# Of processor time. A comparison takes milliseconds.
SECONDS_PER_PAIR = 10.0
# A worker that computes ends itself; this is for one that hangs, or is starved by others.
_WALL_SECONDS_PER_PAIR = 300.0
_SECONDS_TO_START = 300.0
_MEMORY_BYTES = 4 * 1024**3


def require_math_verify() -> None:
    """Raise InputError where math-verify is not installed; imports nothing."""
    if find_spec("math_verify") is None:
        raise InputError(
            "comparing mathematical answers needs the 'math-verify' package: "
            "pip install 'lora-one[evaluation]'"
        )


class _Worker:
    """One process that compares; started on first use, started anew after a kill."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lines: Queue[str] = Queue()

    def compare(self, gold: str, answer: str) -> Compared:
        if self._process is None:
            self._start()
        process = self._process
        try:
            process.stdin.write(json.dumps([gold, answer, SECONDS_PER_PAIR]) + "\n")
            process.stdin.flush()
            line = self._lines.get(timeout=_WALL_SECONDS_PER_PAIR)
        except Empty:
            self.close()
            return "timeout"
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        ended = process.wait()
        self.close()
        return "timeout" if ended == -signal.SIGXCPU else "crashed"

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            with suppress(BrokenPipeError):  # what it did not read is of no use to anybody
                self._process.stdin.close()
            self._process = None

    def _start(self) -> None:
        # -P: no module is taken from the folder that the user happens to be in.
        command = [sys.executable, "-P", "-m", "lora_one.tasks.math_worker", str(_MEMORY_BYTES)]
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        self._lines = Queue()
        Thread(target=_forward, args=(self._process.stdout, self._lines), daemon=True).start()
        try:
            ready = self._lines.get(timeout=_SECONDS_TO_START)
        except Empty:
            ready = ""
        if ready.strip() != '"ready"':
            self.close()
            raise InputError(
                "comparing mathematical answers needs the 'math-verify' package, which did not "
                f"start here (python -m lora_one.tasks.math_worker {_MEMORY_BYTES} says why): "
                "pip install 'lora-one[evaluation]'"
            )


class Equivalence:
    """Compares answers by math-verify.

    Args:
        workers: Processes that compare at the same time; None is one for each core that this rank
            may use, four at most.

    Raises:
        InputError: math-verify is not installed.
    """

    def __init__(self, workers: int | None = None) -> None:
        require_math_verify()
        count = workers or min(4, usable_cores())
        self._workers: Queue[_Worker] = Queue()
        self._all = [_Worker() for _ in range(count)]
        for worker in self._all:
            self._workers.put(worker)
        atexit.register(self.close)

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[Compared]:
        """Say for each pair (gold, answer), in order, whether they are equal.

        What cannot be parsed is unequal.
        """
        distinct = list(dict.fromkeys(pairs))
        with ThreadPoolExecutor(len(self._all)) as threads:
            verdicts = dict(zip(distinct, threads.map(self._one, distinct), strict=True))
        return [verdicts[pair] for pair in pairs]

    def close(self) -> None:
        """Stop the worker processes; they start again when needed."""
        for worker in self._all:
            worker.close()

    def _one(self, pair: tuple[str, str]) -> Compared:
        worker = self._workers.get()
        try:
            return worker.compare(*pair)
        finally:
            self._workers.put(worker)


def _forward(source: Any, lines: "Queue[str]") -> None:
    for line in source:
        lines.put(line)
    lines.put("")  # the process ended: nothing more to wait for

"""Seconds and peak memory of a stretch of code: of the accelerator, else of the process."""

import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Meter:
    """Measures from one ``lap`` to the next.

    Memory on CUDA is what torch allocated on the current device. On a CPU it is the resident set,
    whose high-water mark Linux resets on request; elsewhere the mark of the whole process so far
    is the best that is known.
    """

    def __init__(self) -> None:
        self._restart()

    def lap(self) -> tuple[float, int]:
        """Return the seconds and the peak bytes since the last lap, and start the next."""
        result = time.perf_counter() - self._start, _peak()
        self._restart()
        return result

    def _restart(self) -> None:
        self._start = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):  # not Linux, or not allowed: the mark of the whole process
                CLEAR_REFS.write_text("5")  # resets VmHWM, see proc(5)


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if STATUS.exists():
        lines = STATUS.read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024

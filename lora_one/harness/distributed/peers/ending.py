"""How a rank ends: what the others hear of it, and how nothing is left that could hang."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from lora_one.errors import InputError, NonFiniteError, PeerError, PreemptedError
from lora_one.harness.distributed.ranks import rank
from lora_one.harness.exit_status import BAD_INPUT, outcome

CLOSING_SECONDS = 5.0
"""For records and children, before a rank is ended from outside."""
# Errors that come from the rank that raises them, never from the end of another one.
OWN = (InputError, NonFiniteError, PreemptedError, PeerError)
EXPECTED = (*OWN, KeyboardInterrupt)


@dataclass(frozen=True)
class Ending:
    """How a rank ended.

    Attributes:
        rank: Which.
        host: On which machine.
        status: Its exit status.
        word: Introduces the message, such as ``failed``.
        type: Name of the exception; None for a rank that died.
        message: Why.
        traceback: Where.
    """

    rank: int
    host: str
    status: int
    word: str
    type: str | None
    message: str
    traceback: str

    def __str__(self) -> str:
        told = self.message if self.status == BAD_INPUT else f"{self.type}: {self.message}"
        who = f"rank {self.rank} on host {self.host}"
        return f"{who} {self.message}" if self.type is None else f"{who}: {told}"


OnEnd = Callable[[Ending], Any]
_closers: list[OnEnd] = []


@contextmanager
def on_end(close: OnEnd) -> Iterator[None]:
    """Have ``close`` called, in another thread, when another rank's end ends this process."""
    _closers.append(close)
    try:
        yield
    finally:
        _closers.remove(close)


def ending_by(error: BaseException, host: str) -> Ending:
    """Return how this rank, on ``host``, ends by an error."""
    status, word = outcome(error)
    lines = "".join(traceback.format_exception(error))
    return Ending(rank(), host, status, word, type(error).__name__, _one_line(error), lines)


def close_all(ending: Ending, *, show: bool) -> None:
    """Close what is open, say why, and leave nothing that could hang."""
    for close in list(_closers):
        # In a thread of its own: a file system that hangs must not keep the others waiting.
        closer = threading.Thread(target=close, args=(ending,), daemon=True)
        closer.start()
        closer.join(CLOSING_SECONDS)
    if show:
        if ending.type not in {None, *(kind.__name__ for kind in EXPECTED)}:
            print(ending.traceback, end="", file=sys.stderr)
        print(f"{ending.word}: {ending}", file=sys.stderr, flush=True)


@contextmanager
def deaf() -> Iterator[None]:
    """Take no signals for the moments in which it is decided how the command ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    kept = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def wait_for_the_end() -> NoReturn:
    """Another thread is closing the record and will end the process."""
    while True:
        time.sleep(60)


def exit_now(status: int) -> None:
    """End the process, whatever its threads wait for."""
    sys.stdout.flush()
    sys.stderr.flush()
    # The main thread may be in a collective that never ends; nothing else would end it.
    os._exit(status)


def exit_later(status: int) -> None:
    """Make sure that a failed rank ends, also if its communicator does not let it go."""
    timer = threading.Timer(4 * CLOSING_SECONDS, partial(os._exit, status))
    timer.daemon = True
    timer.start()


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else ""

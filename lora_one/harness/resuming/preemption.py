"""Being asked to stop, by a signal or by a time limit that is close; imports no torch.

SIGTERM, SIGUSR1 and SIGUSR2 raise ``PreemptedError`` where the main thread happens to be, as Ctrl-C
raises ``KeyboardInterrupt``: what is lost can be done again. Training is ``deferred``: there a
request is only noted, and training itself looks for it after every step, keeps a checkpoint and
raises. Only the first request raises; schedulers like to send a signal twice, and the second must
not disturb what writes down the first.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from types import FrameType

from lora_one.errors import PreemptedError
from lora_one.harness.distributed.ranks import is_main
from lora_one.harness.resuming.time_limit import wait_until_close


class Reason(IntEnum):
    """Who asked. Of several, on one rank or on all, the largest counts."""

    TIME_LIMIT = 1
    SIGUSR1 = 2
    SIGUSR2 = 3
    SIGTERM = 4

    @property
    def requeues(self) -> bool:
        """Whether the job may come back by itself.

        Not after SIGTERM, which scancel sends and SLURM's own requeueing too: a cancelled job must
        stay away, and one that SLURM requeues comes back anyway.
        """
        return self is not Reason.SIGTERM

    @property
    def words(self) -> str:
        """How a message says it."""
        return "the job's time limit is close" if self is Reason.TIME_LIMIT else self.name

    def error(self, progress: str) -> PreemptedError:
        """Make the error to raise; ``progress`` says what was kept."""
        return PreemptedError(f"{self.words}; {progress}", requeues=self.requeues)


SIGNALS = {
    signal.SIGTERM: Reason.SIGTERM,
    signal.SIGUSR1: Reason.SIGUSR1,
    signal.SIGUSR2: Reason.SIGUSR2,
}


@dataclass
class _Requests:
    """What was asked of this process. There is one, as there is one table of signal handlers."""

    reason: Reason | None = None
    deferred: bool = False
    raised: bool = False
    time_is_up: bool = False


_requests = _Requests()


@contextmanager
def listening() -> Iterator[None]:
    """Turn the signals into requests; call it in the main thread."""
    global _requests
    _requests = _Requests()
    previous = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    try:
        yield
    finally:
        if _requests.reason is not None:
            # The handlers stay, and do nothing: a second signal must not change the exit status.
            _requests = _Requests(raised=True)
        else:
            for number, handler in previous.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Only note requests; one that nobody has answered at the end is raised there."""
    _requests.deferred = True
    try:
        yield
    finally:
        _requests.deferred = False
    if _requests.reason is not None:
        _raise(_requests.reason)


def heed() -> None:
    """Raise a request that was raised before and did not get through; training is left in peace.

    An error in a destructor or in a callback of compiled code goes no farther. Whoever comes here
    after a request has not been stopped by it.

    Raises:
        PreemptedError: there was one.
    """
    if _requests.reason is not None and not _requests.deferred:
        _raise(_requests.reason)


def requested() -> Reason | None:
    """Return who has asked this process to stop."""
    return _requests.reason


def stop(reason: Reason, step: int) -> PreemptedError:
    """Make the error that training raises once the checkpoint of a step is on the disk."""
    leave_in_peace()
    return reason.error(f"stopped after step {step}; the same command goes on from there")


def leave_in_peace() -> None:
    """Raise nothing from now on: the run is ending and writes down how."""
    _requests.raised = True


@contextmanager
def watching(margin_seconds: float) -> Iterator[None]:
    """Ask to stop when the time limit of this SLURM job is closer than the margin."""
    if "SLURM_JOB_ID" not in os.environ or not is_main():
        yield
        return
    over = threading.Event()

    def watch() -> None:
        if wait_until_close(margin_seconds, over):
            _requests.time_is_up = True
            # The main thread takes it from here, wherever it is.
            os.kill(os.getpid(), signal.SIGUSR2)

    watcher = threading.Thread(target=watch, name="time limit", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _on_signal(number: int, _: FrameType | None) -> None:
    reason = SIGNALS[signal.Signals(number)]
    if reason is Reason.SIGUSR2 and _requests.time_is_up:
        reason = Reason.TIME_LIMIT
    _requests.reason = max(reason, _requests.reason or reason)
    if not (_requests.deferred or _requests.raised):
        _raise(_requests.reason)


def _raise(reason: Reason) -> None:
    leave_in_peace()
    raise reason.error("the same command goes on from the newest checkpoint")

"""A sweep: every point in a process of its own, each done once, one table at the end."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from types import FrameType, TracebackType
from typing import Self

from lora_one.errors import PreemptedError
from lora_one.harness.config.compose import Point
from lora_one.harness.console import say
from lora_one.harness.distributed.peers import gather, on_end, share
from lora_one.harness.distributed.ranks import environment_of_point, is_main
from lora_one.harness.exit_status import BAD_INPUT, DONE, INTERRUPTED, TRY_AGAIN
from lora_one.harness.records.folder import run_id
from lora_one.harness.records.lease import TOKEN_VARIABLE
from lora_one.harness.resuming.preemption import SIGNALS, Reason
from lora_one.harness.sweeps.agenda import Agenda, Step
from lora_one.harness.sweeps.files import SweepFiles

# Tells a point that it belongs to a sweep, and to which: the name of its files in sweeps/.
SWEEP_VARIABLE = "LORA_ONE_SWEEP"
NOT_DONE = {BAD_INPUT: "bad input", TRY_AGAIN: "not done"}


def run_points(points: Sequence[Point], program: str, *, table: bool = True) -> int:
    """Run the points one after the other and show what came out.

    A point that fails does not stop the others. What is finished is not run again, and what other
    processes are doing is left to them, and waited for at the end.

    Args:
        points: What to run.
        program: The script that runs one point.
        table: Whether to show the table of the runs at the end.

    Returns:
        0 if every point is finished, else the status of the first that is not.

    Raises:
        PreemptedError: if this process or a point was asked to stop.
        InputError: if the output folder cannot be written.
    """
    files = SweepFiles(points)
    todo = list(files.runs.values())
    if is_main():
        files.announce()
    with Messenger() as messenger:
        agenda = Agenda(todo, messenger.asked_to_stop) if is_main() else None
        _work_off(agenda, todo, program, files.digest, messenger)
    if agenda is not None:
        if table:
            files.show_table()
        for name, status in agenda.problems.items():
            say(f"{NOT_DONE.get(status, 'failed')}: {name}")
    return share(None if agenda is None else next(iter(agenda.problems.values()), DONE))


def _work_off(
    agenda: Agenda | None,
    points: Sequence[Point],
    program: str,
    digest: str,
    messenger: "Messenger",
) -> None:
    """Run what rank 0's agenda says until it is at its end; all ranks start the same points."""
    while True:
        step = Step(*share(None if agenda is None else agenda.next()))
        if step.stop is not None:
            raise PreemptedError(step.stop, requeues=step.requeues)
        if step.point is None:
            return
        point = points[step.point]
        environment = environment_of_point(run_id(point.config)) | {SWEEP_VARIABLE: digest}
        if agenda is not None:
            environment[TOKEN_VARIABLE] = agenda.lease.token
        # This process holds the lease until the point has taken it over, and if it never does.
        with agenda.lease if agenda is not None else nullcontext():
            process = _start(point, program, environment)
            # If another rank dies, so does this process, and the point with it.
            with on_end(lambda _, process=process: process.terminate()):
                statuses = gather(messenger.wait(process))
        if agenda is not None:
            status = next((status for status in statuses if status != DONE), DONE)
            agenda.settle(step.point, status, process.pid)


def _start(point: Point, program: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a point in a fresh process, so that no state of one run reaches the next."""
    return subprocess.Popen([sys.executable, program, *point.overrides], env=environment)


class Messenger:
    """Hands the signals that ask for a stop on to the point that runs, and remembers them.

    A scheduler may tell this process only, and it is the point that has something to save.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._passed_on = False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked_to_stop(self) -> Reason | None:
        """Say which signal has come, if one has."""
        return None if self._received is None else SIGNALS[self._received]

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for a point to end and return its exit status.

        Raises:
            KeyboardInterrupt: if the point, or this process, was interrupted.
        """
        self._process = process
        if self._received is not None and not self._passed_on:
            process.send_signal(self._received)  # it came while the point was being started
        try:
            status = process.wait()
        except KeyboardInterrupt:
            # Let the point write down that it was interrupted before this process goes.
            process.terminate()
            process.wait()
            raise
        finally:
            self._process = None
        if status in (-signal.SIGINT, INTERRUPTED):
            raise KeyboardInterrupt
        return status

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._received = signal.Signals(number)
        if self._process is not None:
            self._passed_on = True
            self._process.send_signal(number)

"""What a sweep does next: the points that nobody has done and nobody is doing.

Several sweeps over one output folder share the work, wherever they run: each takes the next free
point, puts aside what another is doing, and looks at that again at the end. Under several ranks
only rank 0 has an agenda.
"""

import platform
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_one.errors import InputError, RunHeldError
from lora_one.harness.config.compose import Point
from lora_one.harness.console import say
from lora_one.harness.exit_status import BAD_INPUT, DONE, FAILED, TRY_AGAIN
from lora_one.harness.records.folder import (
    finished_record,
    other_diagnostics,
    read_record,
    run_id,
)
from lora_one.harness.records.lease import (
    LOOKS_PER_EXPIRY,
    Lease,
    Sight,
    Watch,
    claim,
    expiry_seconds,
    lease_folder,
)
from lora_one.harness.resuming.preemption import Reason

# A point that says so often that another process is doing it, when none is, will go on saying so.
MOST_REFUSALS = 3


class Step(NamedTuple):
    """What to do next, as JSON values: run a point, stop with a reason, or neither: the end.

    ``requeues`` says whether a job that is stopped may come back by itself.
    """

    point: int | None = None
    stop: str | None = None
    requeues: bool = False


class Agenda:
    """The points of one sweep, and what became of them.

    Args:
        points: What to run.
        asked_to_stop: Says what asked this process to stop; None: nothing has.

    Raises:
        InputError: if the output folder cannot be read.
    """

    def __init__(self, points: Sequence[Point], asked_to_stop: Callable[[], Reason | None]) -> None:
        self.problems: dict[str, int] = {}
        self.lease: Lease | None = None
        self._points = points
        self._asked_to_stop = asked_to_stop
        self._names = [run_id(point.config) for point in points]
        self._open = deque(range(len(points)))
        self._aside: dict[int, str] = {}
        self._seen_held: set[int] = set()
        self._refusals = [0] * len(points)
        self._stop: Step | None = None
        self._waits = False
        self._watches = [
            Watch(lease_folder(point.config.output_dir, name))
            for point, name in zip(points, self._names, strict=True)
        ]
        # Generations only grow: what has a higher one later on was worked at during this sweep.
        self._before = [self._look(watch).generation for watch in self._watches]

    def next(self) -> Step:
        """Find the next point to run, and take its lease for the process that will run it.

        Waits while all that is left is being done by others.

        Raises:
            InputError: if the output folder cannot be written.
        """
        while self._open or self._aside:
            if reason := self._asked_to_stop():
                self._stop = self._stop or Step(
                    stop=f"the sweep got {reason.words}", requeues=reason.requeues
                )
            if self._stop is not None:
                return self._stop._replace(stop=f"{self._stop.stop}; {self._progress()}")
            if not self._open:
                self._wait()
            index = self._open.popleft()
            config = self._points[index].config
            if record := finished_record(config):
                remark = other_diagnostics(config, record)
                self._say(index, "already done" if remark is None else f"already done, {remark}")
            elif self._take(index):
                self._say(index)
                return Step(point=index)
        return Step()

    def settle(self, index: int, status: int, pid: int) -> None:
        """Take note of how the process that ran a point ended.

        Args:
            index: The point.
            status: Its exit status.
            pid: Its process id.
        """
        name = self._names[index]
        # A signal may reach a point before it can heed one.
        stopped = status < 0 and self._asked_to_stop() is not None
        if stopped or (status == TRY_AGAIN and self._was_preempted(index, pid)):
            if not stopped:
                known = self._record(index)["preempted"]
                why = f"{name} was asked to stop, {known['reason'].partition(';')[0]}"
                self._stop = Step(stop=why, requeues=known["requeues"])
            self._open.appendleft(index)
        elif status == TRY_AGAIN and self._refusals[index] < MOST_REFUSALS:
            self._refusals[index] += 1
            self._put_aside(index, "others", "another process was faster; later")
        elif status != DONE:
            known = status in (BAD_INPUT, TRY_AGAIN)
            self.problems[name] = status if known else FAILED

    def _look(self, watch: Watch) -> Sight:
        try:
            return watch.look()
        except OSError as error:
            raise _unusable(watch, error) from error

    def _take(self, index: int) -> bool:
        """Claim a point; tell whether it is now this sweep's to run."""
        watch = self._watches[index]
        try:
            lease = claim(watch, on_loss=_leave_to_the_successor)
        except RunHeldError:
            sight = self._look(watch)
            who = "others" if sight.holder is None else sight.holder.name
            self._put_aside(index, who, f"being done by {sight}; later")
            return False
        except OSError as error:
            raise _unusable(watch, error) from error
        # What others did up to the claim is certain only now.
        if finished_record(self._points[index].config):
            self._say(index, "already done")
        elif self._failed_meanwhile(index, lease.generation - 1):
            self._say(index, "failed meanwhile, and is not done twice")
            self.problems.setdefault(self._names[index], FAILED)
        else:
            self.lease = lease
            return True
        lease.release()
        return False

    def _put_aside(self, index: int, who: str, why: str) -> None:
        if index not in self._seen_held:
            self._seen_held.add(index)
            self._say(index, why)
        self._aside[index] = who

    def _wait(self) -> None:
        """Wait a little for others, and look at all that was put aside again."""
        if not self._waits:
            self._waits = True
            points = "1 point" if len(self._aside) == 1 else f"{len(self._aside)} points"
            holders = "; ".join(dict.fromkeys(self._aside.values()))
            say(f"waiting for {points}, being done by {holders}")
        time.sleep(expiry_seconds() / LOOKS_PER_EXPIRY)
        self._open.extend(sorted(self._aside))
        self._aside.clear()

    def _record(self, index: int) -> dict[str, Any]:
        folder = Path(self._points[index].config.output_dir) / self._names[index]
        return read_record(folder) or {}

    def _failed_meanwhile(self, index: int, generation: int) -> bool:
        """Tell whether another process has ended a point by failing; not by dying."""
        given_back = self._watches[index].life == "free"
        is_later = generation > self._before[index]
        return given_back and is_later and self._record(index).get("status") == "failed"

    def _was_preempted(self, index: int, pid: int) -> bool:
        """Tell a point that was asked to stop from one that another process took."""
        record = self._record(index)
        writer = {"host": platform.node(), "pid": pid}
        preempted = record.get("status") == "preempted" and "preempted" in record
        return preempted and record.get("process") == writer

    def _progress(self) -> str:
        done = sum(finished_record(point.config) is not None for point in self._points)
        return f"{done} of {len(self._points)} points are finished; the same command does the rest"

    def _say(self, index: int, what: str | None = None) -> None:
        line = f"[{index + 1}/{len(self._points)}] {self._names[index]}"
        say(line if what is None else f"{line}: {what}")


def _unusable(watch: Watch, error: OSError) -> InputError:
    return InputError(
        f"{watch.folder} cannot be used: {error.strerror or error}. Choose another folder with "
        "output_dir=<folder>."
    )


def _leave_to_the_successor(_: str) -> None:
    """Do nothing: the point itself succeeds this process, which writes nothing of the run."""

"""Weights & Biases beside a run: the process that copies the run folder, started and ended.

The run's own part is to write its folder, to send a byte when there is news, and to wait at its
end, for a limited time. It never waits before that, and a copy that fails is one warning.
"""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Protocol

import lora_one
from lora_one.harness.config.schema import Config
from lora_one.harness.console import say
from lora_one.harness.exit_status import DONE
from lora_one.harness.records.record import RunRecord
from lora_one.harness.tracking.follow import END, NEWS
from lora_one.harness.tracking.mirror import wandb_id

# Signals to the whole job are for the run, which tells the copy when it is over.
FOR_THE_RUN = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


class Tracker(Protocol):
    """What follows a run; it reads the run folder."""

    def notice(self) -> None:
        """Look at the folder when there is time."""

    def finish(self) -> None:
        """Take the rest: the record is closed."""


class NoTracker:
    """The run folder is enough."""

    def notice(self) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


class WandbTracker:
    """A process that copies the run folder to W&B, see ``follow.py``.

    Args:
        folder: The run folder.
        timeout: Seconds that ``finish`` waits at most.
    """

    def __init__(self, folder: Path, timeout: float) -> None:
        self._folder, self._timeout = folder.resolve(), timeout
        resumes = ["resumes"] if (self._folder / "metrics.jsonl").exists() else []
        self.log = self._folder / "wandb" / "copy.log"
        self.log.parent.mkdir(exist_ok=True)
        inherited = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_RUN)
        try:
            with self.log.open("w") as log:
                self.process = subprocess.Popen(
                    [
                        sys.executable,
                        "-P",
                        "-m",
                        "lora_one.harness.tracking.follow",
                        str(self._folder),
                        *resumes,
                    ],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=_environment(),
                    start_new_session=True,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, inherited)
        os.set_blocking(self.process.stdin.fileno(), False)
        self._voice = threading.Thread(target=_repeat, args=[self.process.stdout], daemon=True)
        self._voice.start()

    def notice(self) -> None:
        """Tell the process that there is news; a single byte, and nobody waits for it."""
        self._tell(NEWS)

    def finish(self) -> None:
        """Give the process its time to end, then end it; say if something is missing."""
        try:
            status = self._wait_for_the_end()
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
        self._voice.join(timeout=1)
        if status != DONE:
            why = f"not done in {self._timeout:g} s" if status is None else f"see {self.log}"
            say(
                f"warning: wandb: up to {_count(self._folder / 'metrics.jsonl')} lines did not "
                f"reach W&B ({why}); python scripts/wandb_sync.py {self._folder} rebuilds it"
            )

    def _wait_for_the_end(self) -> int | None:
        """Return the exit status of the process, or None if it takes too long."""
        deadline = time.monotonic() + self._timeout
        # Full of news that were not heard yet: the end must not be lost among them.
        select.select([], [self.process.stdin], [], self._timeout)
        self._tell(END)
        self.process.stdin.close()
        try:
            return self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None

    def _tell(self, word: bytes) -> None:
        # It has enough to look at; or it is gone, which finish() says.
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self.process.stdin.fileno(), word)


def start_tracking(config: Config, record: RunRecord) -> Tracker:
    """Start what ``tracking=`` names, on the rank that writes the record, which must be open."""
    if config.tracking == "none" or not record.writes:
        return NoTracker()
    if os.environ.get("WANDB_MODE") == "disabled":
        say("wandb: off, by WANDB_MODE=disabled")
        return NoTracker()
    group = config.wandb.group or os.environ.get("LORA_ONE_SWEEP")
    record.update(wandb={"id": wandb_id(record.run_id), "group": group})
    try:
        return WandbTracker(record.folder, config.wandb.timeout_seconds)
    except OSError as error:
        say(f"warning: wandb: no copy, as its process could not be started: {error}")
        return NoTracker()


def _environment() -> dict[str, str]:
    root = str(Path(lora_one.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    # Another program's W&B service would neither end with this run nor be in this session.
    inherited = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    # W&B's reports about itself go the same way as the data, and hold it up when it is blocked.
    return {"WANDB_ERROR_REPORTING": "false"} | inherited | {"PYTHONPATH": os.pathsep.join(paths)}


def _repeat(voice: BinaryIO) -> None:
    for line in voice:
        say(f"wandb: {line.decode(errors='replace').rstrip()}")


def _count(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)

"""The process beside a run that copies its folder to Weights & Biases while it grows.

    python -m lora_one.harness.tracking.follow <run folder> [resumes]

It is a process and not a thread: then nothing that W&B does or waits for (its hooks on ``sys.exit``
and at exit among it) can reach the run, and a kill ends all of it. The run writes a byte to its
standard input when there is news and ``END`` at its end; when the input closes without ``END``
the run has died, and so does this process, at once: W&B will say "crashed". Lines on its
standard output are for the user; what W&B prints goes to standard error.
"""

import contextlib
import os
import shlex
import sys
import threading
from pathlib import Path

from lora_one.errors import InputError
from lora_one.harness.config.schema import WandbConfig
from lora_one.harness.exit_status import BAD_INPUT, DONE, FAILED, TRY_AGAIN
from lora_one.harness.tracking.mirror import Mirror, Say, brief, choose_mode, read_settings

NEWS, END = b".", b"!"
# A run's end is told through a pipe; should other processes hold it open too, look at the parent.
LOOK_SECONDS = 5.0
# W&B's service may be ended by a signal meant for the whole job, and is then started again.
RESTARTS = 3


class Listener:
    """Hears from the run.

    Args:
        timeout: Seconds after the run's end by which this process ends, whatever W&B does.
    """

    def __init__(self, timeout: float) -> None:
        self.ended = False
        self._news = threading.Event()
        self._timeout = timeout
        self._parent = os.getppid()
        threading.Thread(target=self._listen, daemon=True).start()

    def wait(self) -> None:
        """Return when there is news."""
        while not self._news.wait(LOOK_SECONDS):
            if os.getppid() != self._parent:
                os._exit(FAILED)
        self._news.clear()

    def again(self) -> None:
        """Let the next ``wait`` return at once."""
        self._news.set()

    def _listen(self) -> None:
        while heard := os.read(sys.stdin.fileno(), 65536):
            if END in heard:
                self.ended = True
                deadline = threading.Timer(self._timeout, os._exit, [FAILED])
                deadline.daemon = True
                deadline.start()
            self._news.set()
        if not self.ended:
            os._exit(FAILED)


def follow(folder: Path, say: Say, *, resumes: bool) -> None:
    """Copy the folder until the run ends.

    Args:
        folder: The run folder.
        say: Takes one line for the user.
        resumes: Whether the run goes on from an earlier attempt.

    Raises:
        InputError: if the folder is not a run folder.
        Exception: whatever W&B raises, when it does so again and again.
    """
    where = WandbConfig.model_validate(read_settings(folder)["wandb"])
    listener = Listener(where.timeout_seconds)
    mode, reason = choose_mode()
    mirror: Mirror | None = None
    restarts = 0
    while True:
        try:
            if mirror is None:
                mirror = Mirror(folder, where, mode, say, live=True, resumes=resumes)
                if reason:
                    files = f"{shlex.quote(str(folder))}/wandb/offline-run-*"
                    say(f"offline, {reason}; later: wandb sync {files}")
                    reason = ""
            # Nothing is read before the run has logged something: until then a run that is
            # resumed may cut its files back to where its checkpoint is.
            listener.wait()
            ended = listener.ended
            mirror.catch_up()
            if ended:
                mirror.close()
                return
        except InputError:
            raise
        except Exception as error:  # W&B raises anything from OSError to its own kinds
            if mirror is not None and isinstance(error, TimeoutError):
                raise
            print(f"starting again after {error!r}", file=sys.stderr)
            if mirror is None and mode == "online":
                mode, reason = "offline", f"W&B does not answer ({brief(error)})"
            elif restarts == RESTARTS:
                raise
            else:
                restarts += 1
            mirror, resumes = None, True
            _stop_service()
            listener.again()


def _stop_service() -> None:
    import wandb

    # A service that is gone already cannot be told to go.
    with contextlib.suppress(OSError):
        wandb.teardown()


def main() -> int:
    """Follow the folder that the command line names, and return the exit status."""
    # What W&B or its service print is not for the user.
    voice = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(text: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # the run may be over by now
            print(text, file=voice, flush=True)

    try:
        follow(Path(sys.argv[1]), say, resumes="resumes" in sys.argv[2:])
    except InputError as error:
        say(str(error))
        return BAD_INPUT
    except TimeoutError as error:
        print(error, file=sys.stderr)
        return TRY_AGAIN
    return DONE


if __name__ == "__main__":
    sys.exit(main())

"""What a process of ours tells its caller by its exit status."""

from lora_one.errors import InputError, PreemptedError, RunHeldError

DONE = 0
FAILED = 1
BAD_INPUT = 2
TRY_AGAIN = 75
"""Not finished, and not wrong: preempted, or another process is doing the run. Give the same
command again. (``EX_TEMPFAIL`` of BSD's sysexits.)"""
INTERRUPTED = 130


def outcome(error: BaseException) -> tuple[int, str]:
    """Return the exit status of an error, and the word that introduces its message."""
    if isinstance(error, RunHeldError):
        return TRY_AGAIN, "not done"
    if isinstance(error, PreemptedError):
        return TRY_AGAIN, "preempted"
    if isinstance(error, InputError):
        return BAD_INPUT, "error"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    return FAILED, "failed"

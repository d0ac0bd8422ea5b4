"""What a process of ours tells its caller by its exit status."""

DONE = 0
FAILED = 1
BAD_INPUT = 2
TRY_AGAIN = 75
"""Not finished, and not wrong: preempted, or another process is doing the run. Give the same
command again. (``EX_TEMPFAIL`` of BSD's sysexits.)"""
INTERRUPTED = 130

"""How many things a process may do at the same time."""

import os


def usable_cores() -> int:
    """Return the cores for this process; ranks of one machine share them."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (available or 1) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))

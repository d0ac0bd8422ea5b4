"""Which sources a task has read, and whether they are still the same.

What is made of rows can be kept only as long as the rows stand. A task may read what it likes, in
any layout; every reader of ``rows`` notes what identifies the source that it read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import file_digest
from pathlib import Path
from typing import Any

from lora_one.errors import InputError
from lora_one.tasks.hub import fetch_split

Read = dict[str, Any]
"""``file``, ``sha256``; or ``hub``, ``config``, ``split``, ``revision``, ``commit``, ``files``."""

_READS: ContextVar[list[Read] | None] = ContextVar("reads", default=None)


@contextmanager
def recorded_reads() -> Iterator[list[Read]]:
    """Collect what identifies every file and hub split that is read in this block."""
    reads: list[Read] = []
    token = _READS.set(reads)
    try:
        yield reads
    finally:
        _READS.reset(token)


def note_read(read: Read) -> None:
    """Note a source that was read, for the block that records."""
    reads = _READS.get()
    if reads is not None and read not in reads:
        reads.append(read)


def reads_the_same(read: Read) -> bool:
    """Say whether a source that was read would give the same rows now."""
    if "hub" not in read:
        path = Path(read["file"])
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file_digest(file, "sha256").hexdigest() == read["sha256"]
    try:
        found = fetch_split(read["hub"], read["config"], read["split"], read["revision"])
    except InputError:
        return False
    return (found.commit, found.names) == (read["commit"], read["files"])

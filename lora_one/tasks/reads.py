"""Which sources a task has read, and whether they are still the same.

What is made of rows can be kept only as long as the rows stand. A task may read what it likes, in
any layout; every reader of ``rows`` notes what identifies the source that it read. A task that
opens files itself has to ``note_file`` them.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from lora_one.errors import InputError
from lora_one.tasks.hub import fetch_split

Read = dict[str, Any]
"""``file``, ``sha256``; or ``hub``, ``config``, ``split``, ``revision``, ``commit``, ``files``."""


class Reads:
    """Sources that were read, each once, in order."""

    def __init__(self) -> None:
        self._by_content: dict[str, Read] = {}

    def add(self, read: Read) -> None:
        """Note a source, unless it is noted."""
        self._by_content[json.dumps(read, sort_keys=True)] = read

    def __iter__(self) -> Iterator[Read]:
        return iter(self._by_content.values())


_READS: ContextVar[Reads | None] = ContextVar("reads", default=None)


@contextmanager
def recorded_reads() -> Iterator[Reads]:
    """Collect what identifies every file and hub split that is read in this block."""
    reads = Reads()
    token = _READS.set(reads)
    try:
        yield reads
    finally:
        _READS.reset(token)


def note_read(read: Read) -> None:
    """Note a source that was read, for the block that records."""
    reads = _READS.get()
    if reads is not None:
        reads.add(read)


def note_file(path: Path, content: bytes) -> None:
    """Note a file that was read by other means than ``rows``."""
    note_read({"file": str(path.resolve()), "sha256": sha256(content).hexdigest()})


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

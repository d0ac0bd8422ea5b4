"""Rows kept as they are made, so that an evaluation that is killed goes on where it stopped.

Beside the final ``predictions.jsonl`` lie, while an evaluation goes on, ``predictions.jsonl.part``
(what earlier attempts made) and one ``predictions.jsonl.part-<rank>`` per rank (what this one
makes). The first line of each says which weights and settings the rows belong to; rows of others
are not used. Every line is flushed when it is written; what a kill left of the last is dropped.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lora_one.evaluation.evaluate import Key, Row, row_key

FINAL = "predictions.jsonl"
MERGED = f"{FINAL}.part"

Say = Callable[[str], None]


class Journal:
    """The rows that one rank makes in this attempt; a context manager.

    Args:
        folder: The run folder; made where it is not there (on another node).
        rank: Whose rows these are.
        fingerprint: Identifies weights and settings.
    """

    def __init__(self, folder: Path, rank: int, fingerprint: str) -> None:
        self._path = folder / f"{MERGED}-{rank}"
        self._fingerprint = fingerprint

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w", encoding="utf-8")
        self._write([{"fingerprint": self._fingerprint}])
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows and hand them to the operating system, which outlives this process."""
        self._write(rows)

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        self._file.write(_lines(rows))
        self._file.flush()


def recover(folder: Path, fingerprint: str, say: Say) -> list[Row]:
    """Return the rows of earlier attempts, and put them into one file.

    Call it on one rank only, before any rank opens its ``Journal``.

    Args:
        folder: The run folder.
        fingerprint: Of the present weights and settings; rows of another are left out.
        say: Told what was left out, and why.
    """
    rows: dict[Key, Row] = {}
    parts = _parts(folder)
    for part in parts:
        for row in _read(part, fingerprint, say):
            rows.setdefault(row_key(row), row)
    if parts:
        # Renamed into place whole before the parts go: a kill here loses no row.
        fresh = folder / f".{MERGED}"
        fresh.write_text(_lines([{"fingerprint": fingerprint}, *rows.values()]), encoding="utf-8")
        fresh.replace(folder / MERGED)
        for part in parts:
            if part.name != MERGED:
                part.unlink()
    return list(rows.values())


def is_part(path: Path) -> bool:
    """Tell whether a file of a run folder is one that ``recover`` reads."""
    return path.name == MERGED or path.name.startswith(f"{MERGED}-")


def discard(folder: Path) -> None:
    """Remove the parts, once the final file is there."""
    for part in _parts(folder):
        part.unlink()


def _parts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{MERGED}*") if is_part(path))


def _read(part: Path, fingerprint: str, say: Say) -> list[Row]:
    entries: list[dict[str, Any]] = []
    # Only a newline ends a line: replies may hold U+2028, which str.splitlines would cut at.
    lines = part.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            left = sum(bool(rest) for rest in lines[number - 1 :])
            say(f"note: {part.name}, line {number} is torn; {left} line(s) are made again")
            break
    if not entries:
        return []
    if entries[0].get("fingerprint") != fingerprint:
        say(
            f"note: {part.name} holds {len(entries) - 1} replies of other weights or settings; "
            "they are not used"
        )
        return []
    return entries[1:]


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)

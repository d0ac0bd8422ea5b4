"""Read rows from local files or from the Hugging Face hub, and say exactly what is wrong."""

import gzip
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from lora_one.errors import InputError, some
from lora_one.tasks.hub import fetch_split, split_is_here
from lora_one.tasks.reads import note_read
from lora_one.tasks.tables import read_comma_separated, read_parquet, read_tab_separated

# In the order in which a folder is searched; .txt is tab-separated, as MRPC comes.
_TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".csv", ".tsv", ".parquet")
# How gsm8k and math take validation rows that are not held out.
OWN_VALIDATION = "validation rows of their own in the folder of dataset.path"
# Where nothing else is asked for, a tenth of the training rows is held out, but no more than this.
_MOST_HELD_OUT = 500
# Many a .json file on the hub has one object a line.
_SEVERAL_OBJECTS = re.compile(r"\s*\{[^\n]*\}\s*\n\s*\{")


@dataclass(frozen=True)
class Row:
    """One source row; ``place`` is how a message names it (file and line, or hub id and index)."""

    place: str
    fields: dict[str, Any]

    def text(self, column: str) -> str:
        """Return a column that must hold non-blank text, else raise InputError naming the place."""
        value = self.fields.get(column)
        if not isinstance(value, str) or not value.strip():
            said = "is missing" if column not in self.fields else f"is {value!r}"
            raise InputError(
                f"{self.place}: a row needs text in '{column}', which {said} "
                f"(columns here: {', '.join(self.fields) or 'none'})"
            )
        return value


@dataclass(frozen=True)
class Rows:
    """The rows of one source and what identifies it in a run record."""

    rows: list[Row]
    source: dict[str, Any]


def read_file(
    path: Path, *, columns: Sequence[str] | None = None, leave_out_malformed: bool = False
) -> Rows:
    """Read a local file, by its suffix.

    ``.jsonl`` one object a line; ``.json`` one array of objects, or one object a line; ``.csv`` and
    ``.tsv`` (or ``.txt``) tables, see ``lora_one.tasks.tables``; each of them also as ``.gz``;
    ``.parquet``.

    Args:
        path: The file.
        columns: Names of the columns of a table without a header line.
        leave_out_malformed: Count lines of a ``.tsv`` with another number of columns, instead of
            refusing them; the number is ``left_out`` in the source.

    Raises:
        InputError: No such file, unknown suffix, not UTF-8, malformed content (with the line
            number), an entry that is not an object, or no row at all.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; {what_is_in(path.parent)}")
    if _suffix(path) not in _TEXT_SUFFIXES and path.suffix != ".parquet":
        raise InputError(
            f"{path}: cannot read '{path.suffix}'; expected "
            f"{', '.join(_TEXT_SUFFIXES)} (each also with .gz) or .parquet"
        )
    read = _read(path, columns=columns, leave_out_malformed=leave_out_malformed)
    note_read({"file": str(path.resolve()), "sha256": read.source["sha256"]})
    return read


def _read(
    path: Path, *, columns: Sequence[str] | None = None, leave_out_malformed: bool = False
) -> Rows:
    suffix = _suffix(path)
    raw = path.read_bytes()
    left_out = 0
    if path.suffix == ".parquet":
        rows = [Row(*record) for record in read_parquet(path)]
    elif suffix in (".jsonl", ".json"):
        text = _text(path, raw)
        lines = suffix == ".jsonl" or _SEVERAL_OBJECTS.match(text)
        rows = _read_lines(path, text) if lines else _read_array(path, text)
    elif suffix == ".csv":
        records, left_out = read_comma_separated(path, _text(path, raw), columns)
        rows = [Row(*record) for record in records]
    else:
        records, left_out = read_tab_separated(
            path, _text(path, raw), columns, leave_out_malformed=leave_out_malformed
        )
        rows = [Row(*record) for record in records]
    if not rows:
        raise InputError(f"{path}: the file is empty; expected rows")
    source = {"file": str(path), "sha256": sha256(raw).hexdigest(), "rows": len(rows)}
    return Rows(rows, source | ({"left_out": left_out} if left_out else {}))


def _suffix(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _text(path: Path, raw: bytes) -> str:
    """Unpack where the name ends in .gz, and decode, without the mark that may open the file."""
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: not a whole gzip file ({error})") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def has_split_file(folder: Path, split: str) -> bool:
    """Say whether ``find_split_file`` would find a file."""
    return any((folder / f"{split}{suffix}").is_file() for suffix in SUFFIXES)


def find_split_file(folder: Path, split: str) -> Path:
    """Return ``<folder>/<split>.jsonl``, or another of SUFFIXES.

    Raises:
        InputError: No such folder or none of the files; the message lists what is there.
    """
    if folder.is_file():
        raise InputError(
            f"dataset.path={folder} is a file; expected a folder holding train.jsonl and test.jsonl"
        )
    for suffix in SUFFIXES:
        if (folder / f"{split}{suffix}").is_file():
            return folder / f"{split}{suffix}"
    raise InputError(
        f"{folder}: no {split}.jsonl or {split}.json (or {', '.join(SUFFIXES[2:])}) for the "
        f"{split} split; {what_is_in(folder)}"
    )


def read_hub(hub_id: str, config: str | None, split: str, revision: str | None) -> Rows:
    """Read one split of a dataset on the hub, from the cache of this machine when it is there.

    Args:
        hub_id: Id of the dataset.
        config: One of its configurations; None where it has one only, or a default.
        split: Name of the split in the repository.
        revision: Branch, tag or commit; None is the newest.

    Raises:
        NotPreparedError: The rows are not here and the hub cannot be reached.
        InputError: The hub has no such dataset, configuration or split, or a malformed file.
    """
    try:
        found = fetch_split(hub_id, config, split, revision)
    except InputError as error:
        raise type(error)(f"{error}. Or pass dataset.path=<folder with local files>") from error
    rows: list[Row] = []
    for path in found.paths:
        rows += _read(path).rows
    rows = [Row(f"{hub_id} {split} row {i}", row.fields) for i, row in enumerate(rows)]
    source = {
        "hub": hub_id,
        "config": config,
        "split": split,
        "revision": revision,
        "commit": found.commit,
        "files": found.names,
    }
    note_read(source)
    return Rows(rows, source | {"rows": len(rows)})


def hold_out(
    rows: list[Row],
    held_out: int | None,
    seed: int,
    column: str = "question",
    own_file: str | None = None,
) -> tuple[list[int], list[int]]:
    """Split row positions into (kept, held out), by a seeded hash of each question.

    A question belongs to one side whatever its position in the file and however often it occurs,
    so no question is in both. The ``held_out`` questions with the smallest hash are held out.

    Args:
        rows: The training rows.
        held_out: ``dataset.held_out_rows``; None is a tenth of the questions, at most 500.
        seed: Seed of the hash.
        column: Where a row has its question.
        own_file: How validation rows are given instead, where the benchmark takes any.

    Raises:
        InputError: No row would be left to train on, or none held out.
    """

    def key(row: Row) -> str:
        return sha256(f"{seed}\x1f{row.text(column)}".encode()).hexdigest()

    keys = [key(row) for row in rows]
    distinct = sorted(set(keys))
    if held_out is None:
        held_out = max(1, min(_MOST_HELD_OUT, len(distinct) // 10))
    if not 0 < held_out < len(distinct):
        remedies = ["give more training rows"] if own_file is None else [f"give {own_file}"]
        if len(distinct) > 1:
            remedies.insert(0, f"set dataset.held_out_rows to 1 to {len(distinct) - 1}")
        raise InputError(
            f"cannot hold out {held_out} of {len(distinct)} training questions for validation: "
            f"{', or '.join(remedies)}"
        )
    chosen = set(distinct[:held_out])
    kept = [index for index, this in enumerate(keys) if this not in chosen]
    return kept, [index for index, this in enumerate(keys) if this in chosen]


def hub_cache_holds(
    hub_id: str, config: str | None = None, split: str = "train", revision: str | None = None
) -> bool:
    """Say whether ``read_hub`` would find every file it needs on this machine, whole."""
    return split_is_here(hub_id, config, split, revision)


def _read_lines(path: Path, text: str) -> list[Row]:
    rows = []
    # Only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            fields = _parse(place, line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{place}: not valid JSON ({error.msg}, column {error.colno}); "
                "every line must be one JSON object"
            ) from None
        rows.append(as_row(place, fields))
    return rows


def _read_array(path: Path, text: str) -> list[Row]:
    if not text.strip():
        return []
    try:
        entries = _parse(str(path), text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}, column {error.colno})"
        ) from None
    if not isinstance(entries, list):
        raise InputError(f"{path}: expected a JSON array of objects, found {_kind(entries)}")
    return [as_row(f"{path}, entry {index}", entry) for index, entry in enumerate(entries)]


def _parse(place: str, text: str) -> Any:
    """Parse JSON, also where Python's reader gives up on what the grammar allows."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise InputError(f"{place}: the JSON is nested too deeply; expected plain rows") from None
    except ValueError as error:  # Python reads integers up to a number of digits
        reason = str(error).partition(";")[0]
        raise InputError(f"{place}: a number is too long ({reason}); write it as text") from None


def as_row(place: str, fields: Any) -> Row:
    """Return the row of a parsed JSON object.

    Raises:
        InputError: it is no object, or holds half of a surrogate pair, which no file can be
            written with.
    """
    if not isinstance(fields, dict):
        raise InputError(f"{place}: expected a JSON object, found {_kind(fields)}")
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise InputError(
            f"{place}: a text holds {half}, half of a surrogate pair and no character; write the "
            "whole pair, or leave it out"
        ) from None
    return Row(place, fields)


def _kind(value: Any) -> str:
    names = {list: "an array", dict: "an object", str: "a string", type(None): "null"}
    return names.get(type(value), f"{value!r}")


def what_is_in(folder: Path) -> str:
    """Say what a folder holds, for a message about what it lacks."""
    if not folder.is_dir():
        return f"the folder {folder} does not exist"
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return f"{folder} is empty"
    return f"{folder} holds: {some(names, 12)}"

"""Encoded rows that are paid for once: the same rows, tokenizer, options and code give them back.

An entry is one Arrow file, named by a hash of all that decides the encoding but for the rows
themselves. What identifies the rows (a SHA-256 of every file that was read, or the hub's commit) is
in the entry, and is compared before the entry is used: so a changed file under an old name is
noticed, and the rows need not be parsed to find out. Nothing in an entry is executed.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_one.tasks.base import Example
from lora_one.tasks.encoding import EncodedRows
from lora_one.tasks.packed import PackedRows
from lora_one.tasks.reads import Read, reads_the_same
from lora_one.tasks.rows import SUFFIXES

if TYPE_CHECKING:
    import pyarrow

_FORMAT = 1


@dataclass(frozen=True)
class TokenisedSplit:
    """A split as an entry of the cache holds it.

    Attributes:
        encoded: The rows.
        prompts: A 64-bit hash of each kept row's prompt, to find rows of one split in another.
        texts: The same of prompt and target.
        counts: What the task counted when it read the split.
        source: What the task noted of its source.
        reads: Every source that was read.
    """

    encoded: EncodedRows
    prompts: np.ndarray
    texts: np.ndarray
    counts: dict[str, int]
    source: Any
    reads: list[Read]


@dataclass(frozen=True)
class Miss:
    """Why an entry could not be used; ``reason`` is None where there simply is none."""

    reason: str | None


def text_hashes(examples: Iterable[Example], *, target: bool) -> np.ndarray:
    """Hash the prompt of every example, or its prompt and target, to 64 bits."""
    texts = (f"{e.prompt}\x1f{e.target}" if target else e.prompt for e in examples)
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(digests), dtype="<u8")


def cache_key(tokenizer: Any, folders: Iterable[Path], **facts: Any) -> str:
    """Return the hexadecimal name of an entry.

    Args:
        tokenizer: Its content counts, not its name.
        folders: Where the task looks for files. The names of the files in them count (a file that
            appears may change what a task reads); their content is compared by ``load``.
        **facts: The task, its options, the selection, the limits: JSON values.
    """
    listing = {str(folder): _data_files(folder) for folder in sorted(folders)}
    everything = {
        "format": _FORMAT,
        "code": _source(),
        "versions": [version("tokenizers"), version("transformers")],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "folders": listing,
        "facts": facts,
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash what a tokenizer does: its serialised content and its special tokens."""
    digest = hashlib.sha256()
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    digest.update(json.dumps([type(tokenizer).__name__, special], sort_keys=True).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        digest.update(backend.to_str().encode())
        return digest.hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def load(folder: Path, key: str) -> TokenisedSplit | Miss:
    """Find an entry, and make sure that it is whole, ours, and of the rows as they are now."""
    import pyarrow

    file = entry_file(folder, key)
    if not file.is_file():
        return Miss(None)
    try:
        # Mapped, not read: pages come in when rows are asked for, and ranks share them.
        table = pyarrow.ipc.open_file(pyarrow.memory_map(str(file))).read_all()
        facts = json.loads((table.schema.metadata or {})[b"lora_one"])
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        return Miss(f"{file} cannot be read ({type(error).__name__})")
    if facts.get("key") != key:
        return Miss(f"{file} belongs to another configuration")
    table = table.combine_chunks()
    if _checksum(table) != facts["checksum"]:
        return Miss(f"{file} is damaged")
    for read in facts["reads"]:
        if not reads_the_same(read):
            return Miss(f"{read.get('file') or read['hub']} has changed since it was tokenised")
    return _unpack(table, facts)


def store(folder: Path, key: str, split: TokenisedSplit) -> Path:
    """Write an entry: under another name first, so that it is there whole or not at all.

    Several processes may store the same entry at once. One that finds it there leaves it: others
    have it mapped into memory, and on NFS lose what is replaced from another machine.
    """
    import pyarrow

    table = _pack(split)
    facts = {
        "key": key,
        "checksum": _checksum(table),
        "dropped_row_ids": split.encoded.dropped_row_ids,
        "max_length": split.encoded.max_length,
        "counts": split.counts,
        "source": split.source,
        "reads": split.reads,
    }
    table = table.replace_schema_metadata({"lora_one": json.dumps(facts)})
    folder.mkdir(parents=True, exist_ok=True)
    target = entry_file(folder, key)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            with pyarrow.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            file.flush()
            os.fsync(file.fileno())
        if isinstance(load(folder, key), TokenisedSplit):
            Path(temporary).unlink()
        else:
            Path(temporary).chmod(0o644)
            Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


def _pack(split: TokenisedSplit) -> "pyarrow.Table":
    import pyarrow

    columns: dict[str, Any] = {}
    for name, first in split.encoded.rows[0].items():
        # Token ids and classes are integers; the labels of a regression are not.
        value = pyarrow.float64() if isinstance(first[0], float) else pyarrow.int32()
        rows = [row[name] for row in split.encoded.rows]
        columns[name] = pyarrow.array(rows, type=pyarrow.large_list(value))
    columns["row_id"] = pyarrow.array(split.encoded.row_ids, type=pyarrow.large_string())
    columns["prompt"] = pyarrow.array(split.prompts)
    columns["text"] = pyarrow.array(split.texts)
    return pyarrow.table(columns)


def _unpack(table: "pyarrow.Table", facts: Mapping[str, Any]) -> TokenisedSplit:
    import pyarrow

    lists = {
        name: table[name].chunk(0)
        for name in table.column_names
        if pyarrow.types.is_large_list(table.schema.field(name).type)
    }
    rows = PackedRows(
        {name: array.values.to_numpy() for name, array in lists.items()},
        {name: array.offsets.to_numpy() for name, array in lists.items()},
    )
    encoded = EncodedRows(
        rows, table["row_id"].to_pylist(), facts["dropped_row_ids"], facts["max_length"]
    )
    hashes = [table[column].to_numpy() for column in ("prompt", "text")]
    return TokenisedSplit(encoded, *hashes, facts["counts"], facts["source"], facts["reads"])


def _checksum(table: "pyarrow.Table") -> str:
    digest = hashlib.sha256()
    for name in table.column_names:
        for chunk in table[name].chunks:
            for buffer in chunk.buffers():
                if buffer is not None:
                    digest.update(buffer)
    return digest.hexdigest()


def _data_files(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.name.endswith((*SUFFIXES, ".txt")))
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _source() -> str:
    """Return a hash of the code that decides what a row is and how it is encoded."""
    digest = hashlib.sha256()
    tasks = Path(__file__).parent
    library = tasks.parent
    choosing = [library / "snapshots.py", library / "harness" / "data" / "splits.py"]
    for file in sorted([*tasks.rglob("*.py"), *choosing]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def entry_file(folder: Path, key: str) -> Path:
    """Return where an entry is kept."""
    return folder / f"{key[:32]}.arrow"

"""Reads W&B's transaction log (``run-<id>.wandb``), for which wandb 0.31 ships no Python reader.

The file is a LevelDB log: a header of 7 bytes, then blocks of 32 KiB with chunks
``crc32 (4), length (2), type (1), data``; a record is one whole chunk or a first, some middle and a
last one.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK, CHUNK = 7, 32768, struct.Struct("<IHB")
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Record]:
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = HEADER, b""
    while position + CHUNK.size <= len(data):
        room = BLOCK - position % BLOCK
        if room < CHUNK.size:
            position += room
            continue
        _, length, kind = CHUNK.unpack_from(data, position)
        start = position + CHUNK.size
        parts = (parts if kind in (MIDDLE, LAST) else b"") + data[start : start + length]
        position = start + length
        if kind in (WHOLE, LAST):
            yield Record.FromString(parts)


def read_run(folder: Path) -> SimpleNamespace:
    """What the only offline copy in a run folder says."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    run = SimpleNamespace(history=[], summary={}, config={}, metrics=[], artifacts=[], exit=None)
    for record in records(path):
        match record.WhichOneof("record_type"):
            case "run":
                run.id, run.project, run.group = (
                    record.run.run_id,
                    record.run.project,
                    record.run.run_group,
                )
                run.name, run.tags = record.run.display_name, list(record.run.tags)
                run.config |= _items(record.run.config.update)
            case "config":
                run.config |= _items(record.config.update)
            case "history":
                run.history.append(_items(record.history.item))
            case "summary":
                run.summary |= _items(record.summary.update)
            case "metric":
                run.metrics.append(record.metric)
            case "artifact":
                run.artifacts.append(record.artifact)
            case "exit":
                run.exit = record.exit.exit_code
    return run


def _items(updates) -> dict:
    return {
        update.key or ".".join(update.nested_key): json.loads(update.value_json)
        for update in updates
    }

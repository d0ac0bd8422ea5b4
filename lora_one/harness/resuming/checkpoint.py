"""Checkpoints as folders: whole or not there, checksummed, the newest few; imports no torch.

``<run folder>/checkpoints/step-<n>/`` holds safetensors and JSON files (what is in them, see
``training_state`` and ``resume``) and ``manifest.json`` with the size and the SHA-256 of each, and
with the length that the growing files of the run folder had. It is written under a name that
nothing reads, synced to the disk and renamed, so that a kill at any moment leaves the older ones as
they were.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_one.harness.records.folder import publish

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is there.

    Attributes:
        path: Its folder.
        step: Optimiser steps done.
    """

    path: Path
    step: int

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the contents of one of its JSON files."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    @property
    def lengths(self) -> dict[str, int]:
        """How many bytes the growing files of the run folder had."""
        return self.read_json(MANIFEST)["lengths"]


def write_checkpoint(
    run_folder: Path,
    step: int,
    fill: Callable[[Path], None],
    *,
    lengths: dict[str, int],
    keep: int,
) -> Checkpoint:
    """Write the checkpoint of a step and remove all but the newest few.

    Args:
        run_folder: The run's folder.
        step: Optimiser steps done.
        fill: Writes the files into the folder that it is given.
        lengths: Bytes of the growing files of the run folder, which are on the disk already.
        keep: How many stay, this one included.

    Raises:
        OSError: if it cannot be written; the older ones are as they were.
    """
    root = run_folder / FOLDER
    root.mkdir(exist_ok=True)
    partial, final = root / f".step-{step}.partial", root / f"step-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        fill(partial)
        files = {file.name: _describe(file) for file in sorted(partial.iterdir())}
        manifest = {"format": FORMAT, "step": step, "lengths": lengths, "files": files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        publish(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in _newest_first(run_folder)[keep:]:
        shutil.rmtree(old.path)
    return Checkpoint(final, step)


def newest_valid(run_folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, or None; nothing is changed.

    Args:
        run_folder: The run's folder.
        say: Told of each newer one that is not whole, and why.
    """
    for checkpoint in _newest_first(run_folder):
        fault = find_fault(checkpoint)
        if fault is None:
            return checkpoint
        say(f"note: checkpoint {checkpoint.path.name} is skipped: {fault}")
    return None


def find_fault(checkpoint: Checkpoint) -> str | None:
    """Say what is wrong with a checkpoint's files; None where they are as they were written."""
    try:
        manifest = checkpoint.read_json(MANIFEST)
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, expected {FORMAT}"
        for name, length in manifest["lengths"].items():
            size = (checkpoint.path.parents[1] / name).stat().st_size
            if size < length:
                return f"{name} of the run has {size} bytes, and had {length} when it was written"
        for name, expected in manifest["files"].items():
            size = (checkpoint.path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, expected {expected['bytes']}"
            if _describe(checkpoint.path / name) != expected:
                return f"{name} does not have its SHA-256 sum"
    except OSError as error:
        return f"{Path(error.filename or '').name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


def drop_others(run_folder: Path, chosen: Checkpoint) -> None:
    """Remove what is newer than the chosen checkpoint, and what a kill left of an unwritten one."""
    kept = {old.path for old in _newest_first(run_folder) if old.step <= chosen.step}
    for entry in (run_folder / FOLDER).iterdir():
        if entry not in kept:
            shutil.rmtree(entry)


def _newest_first(run_folder: Path) -> list[Checkpoint]:
    found = []
    for path in (run_folder / FOLDER).glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdecimal():
            found.append(Checkpoint(path, int(number)))
    return sorted(found, key=lambda checkpoint: -checkpoint.step)


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}

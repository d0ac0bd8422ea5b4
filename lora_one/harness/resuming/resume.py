"""Which checkpoint a run goes on from, and whether that checkpoint is one of this run at all."""

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_one.errors import InputError
from lora_one.harness.config.schema import Config
from lora_one.harness.data.rows import Data
from lora_one.harness.distributed.peers import share
from lora_one.harness.distributed.ranks import world_size
from lora_one.harness.records.folder import settings_digest
from lora_one.harness.resuming.checkpoint import Checkpoint, newest_valid

IDENTITY = "identity.json"
# What decides the arithmetic; another version resumes, but not bit for bit.
VERSIONED = ("torch", "transformers", "accelerate", "peft", "lora-one")


def identity_of(config: Config, data: Data, base: str | None) -> dict[str, Any]:
    """Describe what a checkpoint belongs to.

    Args:
        config: The run.
        data: Its rows.
        base: Fingerprint of the base weights.
    """
    splits = {"train": data.train, "validation": data.validation}
    rows = {name: _hash(split.row_ids) for name, split in splits.items() if split is not None}
    return {
        "settings": settings_digest(config),
        "base": base,
        "rows": rows | {"test": _hash([example.row_id for example in data.test])},
        "template": data.facts["template"],
        "ranks": world_size(),
        "diagnostics": config.diagnostics.model_dump() if config.diagnostics.layers else None,
        "versions": {name: _version(name) for name in VERSIONED},
    }


def write_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Write it into the folder of a checkpoint."""
    (folder / IDENTITY).write_text(json.dumps(identity) + "\n", encoding="utf-8")


def find_checkpoint(
    folder: Path, identify: Callable[[], dict[str, Any]], say: Callable[[str], None]
) -> Checkpoint | None:
    """Return the newest checkpoint that is whole; the same on every rank, and nothing is changed.

    Args:
        folder: The run folder.
        identify: Returns what this run is, see ``identity_of``; called only where there is one.
        say: Told what is skipped, and what will differ.

    Raises:
        InputError: if it belongs to another run.
    """
    found = newest_valid(folder, say)
    step = share(None if found is None else found.step)
    if step is None:
        return None
    if found is None or found.step != step:
        raise InputError(
            f"{folder}: rank 0 sees the checkpoint of step {step}, this rank does not. All ranks "
            "need the same output_dir on a shared file system."
        )
    _compare(found, identify(), say)
    return found


def _compare(checkpoint: Checkpoint, here: dict[str, Any], say: Callable[[str], None]) -> None:
    there = checkpoint.read_json(IDENTITY)
    advice = (
        f"Put back what it was, or remove {checkpoint.path.parent} to start anew, or give another "
        "output_dir."
    )
    # JSON has no tuples: compare what both would be in a file.
    here = json.loads(json.dumps(here))
    different = [part for part in here if part != "versions" and here[part] != there.get(part)]
    if different:
        raise InputError(f"{checkpoint.path} {_explain(different[0], there, here)}. {advice}")
    for name, now in here["versions"].items():
        then = there["versions"].get(name)
        if then != now:
            say(
                f"warning: {checkpoint.path.name} was written with {name} {then}, this is {now}; "
                "the run goes on, perhaps not bit for bit"
            )


def _explain(part: str, there: dict[str, Any], here: dict[str, Any]) -> str:
    if part == "settings":
        return "was written under another configuration"
    if part == "base":
        return f"was written with base weights {there['base']}, and these are {here['base']}"
    if part == "ranks":
        return f"was written by {there['ranks']} ranks, and these are {here['ranks']}"
    if part == "diagnostics":
        return (
            f"was written with diagnostics={there.get(part)}, and these are {here[part]}: half of "
            "the log would lack them"
        )
    if part == "rows":
        splits = [name for name in here["rows"] if here["rows"][name] != there["rows"].get(name)]
        return f"was written with other {' and '.join(splits)} rows: the dataset has changed"
    return "was written with another prompt template: the benchmark has changed"


def _hash(row_ids: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(row_ids).encode()).hexdigest()


def _version(package: str) -> str | None:
    import lora_one

    return lora_one.__version__ if package == "lora-one" else version(package)

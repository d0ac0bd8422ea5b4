"""The files of a base model: which of a repository's files a run reads, and whether they are whole.

Weights are safetensors only, one ``model.safetensors`` or the shards of
``model.safetensors.index.json``, as ``from_pretrained`` chooses. What else lies in a repository
(pickled weights, other frameworks' weights, a second copy in another layout) is never fetched.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lora_one.errors import InputError, NotPreparedError
from lora_one.harness.config.schema import ModelConfig
from lora_one.snapshots import Snapshot, cached_snapshot, fetch

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Tokenizers and small configuration files, at the top of the repository.
_SMALL = (".json", ".model", ".txt", ".jinja", ".tiktoken")
_TOKENIZER = re.compile(r"tokenizer|vocab|merges|tekken|\.model$|\.tiktoken$")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model on this machine.

    Attributes:
        folder: Where they lie.
        names: Their names in it.
        commit: Commit of the repository; None for a local folder.
    """

    folder: Path
    names: list[str]
    commit: str | None

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum((self.folder / name).stat().st_size for name in self.names)


def fetch_model(model: ModelConfig) -> ModelFiles:
    """Bring what a run reads of a hub model here, unless it is, and look at the weights' headers.

    Raises:
        NotPreparedError: A file is not here and the hub cannot be asked for it.
        InputError: The hub does not have it, or not as safetensors, or a file is damaged.
    """
    snapshot = fetch(model.name, "model", model.revision, [CONFIG, INDEX])
    names = _names(snapshot, with_code=model.trust_remote_code)
    snapshot = fetch(model.name, "model", snapshot.commit, names)
    if missing := snapshot.missing(names):
        raise NotPreparedError(
            f"model.name={model.name}: {missing[0]} did not arrive in {snapshot.folder}"
        )
    require_weights(snapshot.folder)
    return ModelFiles(snapshot.folder, names, snapshot.commit)


def model_is_here(model: ModelConfig) -> bool:
    """Say whether every file that ``fetch_model`` would fetch is on this machine, whole."""
    snapshot = cached_snapshot(model.name, "model", model.revision)
    if snapshot is None or snapshot.missing({CONFIG, INDEX} & set(snapshot.names)):
        return False
    try:
        names = _names(snapshot, with_code=model.trust_remote_code)
        if snapshot.missing(names):
            return False
        require_weights(snapshot.folder)
    except InputError:
        return False
    return True


def local_model(folder: Path) -> ModelFiles:
    """Look at a model in a local folder.

    Raises:
        InputError: No config or no whole safetensors weights.
    """
    require_weights(folder)
    names = [path.name for path in folder.iterdir() if path.suffix in _SMALL]
    return ModelFiles(folder, sorted({*names, *weight_names(folder)}), None)


def require_weights(folder: Path) -> None:
    """Check that a folder holds a config and whole safetensors weights.

    The header of a safetensors file says how long the file is, so one that was cut short is found
    without reading its tensors.

    Raises:
        InputError: What is missing or damaged.
    """
    if not (folder / CONFIG).exists():
        raise InputError(f"model.name={folder}: the folder has no config.json.")
    present = [path.name for path in folder.iterdir()]
    if not {WEIGHTS, INDEX} & set(present):
        raise InputError(
            f"model.name={folder}: the folder has no safetensors weights.{_hint(present)}"
        )
    for name in weight_names(folder):
        if not (folder / name).is_file():
            raise InputError(f"model.name={folder}: {name}, which its index lists, is not there.")
        try:
            with safe_open(folder / name, "pt"):
                pass
        except SafetensorError as error:
            raise InputError(f"model.name={folder}: {name} is damaged: {error}") from error


def require_tokenizer(folder: Path) -> None:
    """Check that a folder holds a tokenizer; transformers would make up an empty one.

    Raises:
        InputError: It does not.
    """
    if not any(_TOKENIZER.search(path.name) for path in folder.iterdir()):
        raise InputError(
            f"model.name={folder}: the folder has no tokenizer. Expected tokenizer.json and "
            "tokenizer_config.json beside the weights; save the model's tokenizer there."
        )


def weight_names(folder: Path) -> list[str]:
    """Return the names of the weight files that ``from_pretrained`` would read from a folder."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [WEIGHTS]
    try:
        shards = json.loads((folder / INDEX).read_text())["weight_map"].values()
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{folder / INDEX} is damaged: no weight_map in it") from error
    return sorted(set(shards))


def _names(snapshot: Snapshot, *, with_code: bool) -> list[str]:
    """Choose among the names of a snapshot whose config and index are here."""
    present = snapshot.names
    if WEIGHTS in present:
        weights = [WEIGHTS]
    elif INDEX in present:
        weights = weight_names(snapshot.folder)
    else:
        raise InputError(
            f"model.name={snapshot.repository}: the repository has no safetensors weights."
            f"{_hint(present)}"
        )
    suffixes = (*_SMALL, ".py") if with_code else _SMALL
    small = [name for name in present if "/" not in name and name.endswith(suffixes)]
    templates = [name for name in present if name.startswith("additional_chat_templates/")]
    return sorted({*weights, *small, *templates})


def _hint(present: Iterable[str]) -> str:
    others = sorted(name for name in present if name.endswith(_PICKLED))
    if others:
        return (
            f" It has {', '.join(others[:4])}, which this project does not unpickle: convert them "
            "to safetensors."
        )
    return f" Expected {WEIGHTS}, or {INDEX} and its shards."

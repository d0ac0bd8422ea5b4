"""The adapter of ``evaluate.adapter``: what its folder says, before anything is loaded."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lora_one.errors import InputError

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"


@dataclass(frozen=True)
class GivenAdapter:
    """A PEFT adapter folder.

    Attributes:
        path: The folder.
        base: The base model that it was made for, as it says; None where it does not.
        kind: PEFT's type, ``LORA`` for example.
        task_type: PEFT's word for the architecture, ``SEQ_CLS`` for example; None where not said.
    """

    path: Path
    base: str | None
    kind: str
    task_type: str | None

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the weights file."""
        with (self.path / WEIGHTS).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def read_adapter(path: str | Path) -> GivenAdapter:
    """Look at an adapter folder.

    Raises:
        InputError: no such folder, no readable ``adapter_config.json``, or no safetensors weights.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"evaluate.adapter={path}: there is no such folder.")
    held = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(
                f"evaluate.adapter={path}: there is no {name}; the folder holds {held}. A merged "
                "model is evaluated with model.name=<folder> train=none init=lora."
            )
    try:
        settings = json.loads((folder / SETTINGS).read_text())
        kind, base = settings["peft_type"], settings.get("base_model_name_or_path")
        task_type = settings.get("task_type")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"evaluate.adapter={path}: {SETTINGS} cannot be read: {error!r}") from None
    for key, value in (("base_model_name_or_path", base), ("task_type", task_type)):
        if not isinstance(value, str | None):
            raise InputError(
                f"evaluate.adapter={path}: {SETTINGS} has {key}={value!r}; expected a text."
            )
    return GivenAdapter(folder, base or None, kind, task_type)

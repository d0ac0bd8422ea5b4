"""Read run folders: nothing but ``run.json`` and ``config.yaml``."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lora_one.harness.folder import NOT_PART_OF_THE_RUN, read_record, without


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        folder: Where it lies.
        record: ``run.json``; empty where it is missing or torn.
        settings: ``config.yaml`` as flat ``section.key`` names, without what only says where a
            run is kept.
    """

    folder: Path
    record: dict[str, Any]
    settings: dict[str, Any]

    @property
    def status(self) -> str:
        """``finished``, ``running``, ``failed``, ``preempted`` or ``missing``."""
        return self.record.get("status", "missing")


def load_runs(folders: Iterable[Path]) -> list[Run]:
    """Read the given folders, also those that never finished."""
    return [Run(folder, read_record(folder) or {}, _settings(folder)) for folder in folders]


def find_runs(output_dir: Path) -> list[Run]:
    """Read every run folder directly below ``output_dir``."""
    return load_runs(sorted(file.parent for file in output_dir.glob("*/run.json")))


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "config.yaml"
    if not file.exists():
        return {}
    nested = OmegaConf.to_container(OmegaConf.load(file))
    return _flatten(without(nested, NOT_PART_OF_THE_RUN))


def _flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat

"""Read run folders: ``run.json`` and ``config.yaml``; what is wrong is said, not raised."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_one.harness.records.folder import NEUTRAL, NOT_PART_OF_THE_RUN, without

RUN_FILES = ("run.json", "config.yaml", "metrics.jsonl")
STATUSES = ("running", "finished", "failed", "preempted")


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        folder: Where it lies.
        record: ``run.json``; empty where it is missing or torn.
        settings: ``config.yaml`` as flat ``section.key`` names, without what only says where a
            run is kept.
        problem: Why the folder cannot be read as a run, in one line; None where it can.
    """

    folder: Path
    record: dict[str, Any]
    settings: dict[str, Any]
    problem: str | None = None

    @property
    def status(self) -> str:
        """``finished``, ``running``, ``failed``, ``preempted``, ``malformed`` or ``missing``.

        ``missing`` has no record (yet); ``malformed`` is one that cannot be trusted, also where
        it says that it is finished.
        """
        if self.problem is not None:
            return "malformed"
        return self.record.get("status", "missing")


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class _Phase(_Lenient):
    seconds: float
    # A Python integer may be larger than any float, and no table could show it.
    peak_memory_bytes: int = Field(lt=2**63)


class _Init(_Lenient):
    seconds: float | None = None


class _Losses(_Lenient):
    validation: float | None


class _Finished(_Lenient):
    """What the record of a finished run must hold to be counted."""

    method: str
    primary_metric: str
    metrics: dict[str, Any]
    losses: _Losses
    phases: dict[str, _Phase] = Field(min_length=1)
    init: _Init | None = None


class _Loader(yaml.CSafeLoader):
    """YAML as OmegaConf reads it: ``1e-3`` is a number."""


_Loader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_runs(folders: Iterable[Path]) -> list[Run]:
    """Read the given folders, also those that never finished."""
    return [_load(folder) for folder in folders]


def find_runs(output_dir: Path) -> list[Run]:
    """Read every run folder directly below ``output_dir``; no folder is no run."""
    if not output_dir.is_dir():
        return []
    entries = sorted(entry for entry in output_dir.iterdir() if entry.is_dir())
    return load_runs(
        entry for entry in entries if any((entry / name).is_file() for name in RUN_FILES)
    )


def _load(folder: Path) -> Run:
    record: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    try:
        record = _read_record(folder / "run.json")
        settings = _read_settings(folder / "config.yaml")
        problem = _defect(record, settings)
    except (OSError, ValueError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
    return Run(folder, record, settings, problem)


def _read_record(file: Path) -> dict[str, Any]:
    """Return the record, empty where there is none.

    Raises:
        ValueError: The file holds something else.
    """
    if not file.exists():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"run.json cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"run.json holds a {type(record).__name__}, expected an object")
    return record


def _read_settings(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    nested = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a safe one
    if not isinstance(nested, dict):
        raise ValueError(f"config.yaml holds a {type(nested).__name__}, expected a mapping")
    # A run has the same name with and without these keys, so it has the same settings.
    return NEUTRAL | _flatten(without(nested, NOT_PART_OF_THE_RUN))


def _defect(record: dict[str, Any], settings: dict[str, Any]) -> str | None:
    """Return what keeps a record from being counted, or from being believed at all."""
    status = record.get("status")
    if record and status not in STATUSES:
        return f"run.json has status {status!r}, expected one of {', '.join(STATUSES)}"
    if status != "finished":
        return None
    try:
        finished = _Finished.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"run.json says finished, but {where}: {first['msg'].lower()}"
    if not settings:
        return "there is no config.yaml"
    value = finished.metrics.get(finished.primary_metric)
    if value is not None and not is_number(value):
        return f"run.json says finished, but {finished.primary_metric} is {value!r}"
    return _unreadable_setting(settings)


def _unreadable_setting(settings: dict[str, Any]) -> str | None:
    """What the tables read: a trained run has an optimiser and a learning rate."""
    samples = settings.get("evaluation.samples")
    if samples is not None and not (isinstance(samples, int) and samples >= 1):
        return "config.yaml gives no number above 0 as evaluation.samples"
    if not is_trained(settings):
        return None
    if not isinstance(settings.get("optimizer.name"), str):
        return "config.yaml names no optimizer.name"
    if not is_number(settings.get("model.learning_rate")):
        return "config.yaml gives no number as model.learning_rate"
    return None


def is_trained(settings: dict[str, Any]) -> bool:
    """Tell whether a run trains, or shows a start or an adapter as it is."""
    return settings.get("train") != "none" and settings.get("evaluate.adapter") is None


def is_number(value: Any) -> bool:
    """Tell whether a value is a number that a table or a plot can show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

"""From overrides to validated configurations: Hydra composes, the schema judges."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_one.errors import InputError, nearest
from lora_one.harness.config.published import translate
from lora_one.harness.config.schema import GROUPS, Config
from lora_one.harness.config.validate import validate

# How Hydra's messages about a sweep without -m begin.
SWEEP_WITHOUT_FLAG = ("Ambiguous value", "Sweep parameters")


@dataclass(frozen=True)
class Point:
    """One point of a sweep: what was asked for, and what it means."""

    overrides: tuple[str, ...]
    config: Config


@contextmanager
def composer(conf: Path) -> Iterator[None]:
    """Make Hydra compose from the folder ``conf``."""
    with initialize_config_dir(version_base="1.3", config_dir=str(conf.resolve())):
        yield


def compose_config(overrides: Sequence[str]) -> Config:
    """Compose and validate one configuration; call inside ``composer``."""
    for override in overrides:
        group, _, choice = override.partition("=")
        if group in GROUPS and choice and not _is_text(choice):
            # Hydra has a bare ValueError for it, and would merge the files of a list.
            raise InputError(_no_such_choice(group, choice, _choices(group)))
    try:
        composed = compose("config", list(overrides))
        return validate(OmegaConf.to_container(composed, resolve=True))
    except MissingConfigException as error:
        raise InputError(_explain_missing_choice(error)) from error
    except ConfigCompositionException as error:
        forced = [_force(override) for override in overrides]
        if forced == list(overrides) or str(error).startswith(SWEEP_WITHOUT_FLAG):
            raise InputError(_first_line(error)) from error
        # The schema knows the valid keys: let it say which one was meant.
        return compose_config(forced)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(_first_line(error)) from error


def expand(overrides: Sequence[str]) -> tuple[list[Point], list[str]]:
    """Expand a sweep (``a=1,2``, ``b=range(3)``, ``init=glob(*)``) into its distinct points.

    Official spellings are translated point by point, so that what one of them implies (the model
    of a benchmark, the preset of a direction) holds for its own points only.

    Returns:
        The points, in order, and the notes of the translation.

    Raises:
        InputError: an override is wrong, or has no value to run.
    """
    try:
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parsed = parser.parse_overrides(list(overrides))
        batches = BasicSweeper.split_arguments(parsed, None)
    except HydraException as error:
        raise InputError(_first_line(error)) from error
    if not batches[0]:
        swept = (override for override in parsed if override.is_sweep_override())
        empty = next(one for one in swept if not list(one.sweep_string_iterator()))
        raise InputError(
            f"{empty.input_line}: no value to run. Give a range that is not empty, or a pattern "
            "that fits a choice."
        )
    points: dict[str, Point] = {}
    notes: dict[str, None] = {}
    for raw in batches[0]:
        translated, said = translate(raw)
        notes |= dict.fromkeys(said)
        point = Point(tuple(translated), compose_config(translated))
        points.setdefault(point.config.model_dump_json(), point)
    return list(points.values()), list(notes)


def _force(override: str) -> str:
    """``key=value`` as ``++key=value``; group choices, deletions and the like stay."""
    key = override.partition("=")[0]
    is_plain = not override.startswith(("+", "~")) and "=" in override and key not in GROUPS
    return f"++{override}" if is_plain else override


def _explain_missing_choice(error: MissingConfigException) -> str:
    group, _, choice = (error.missing_cfg_file or "").partition("/")
    options = _choices(group) if group in GROUPS else []
    if not options:
        return _first_line(error)
    return _no_such_choice(group, choice, options)


def _is_text(choice: str) -> bool:
    try:
        return isinstance(yaml.safe_load(choice), str)
    except yaml.YAMLError:
        return True  # Hydra's own parser says what is wrong with it


def _no_such_choice(group: str, choice: str, options: Sequence[str]) -> str:
    return (
        f"{group}={choice}: no such choice.{nearest(choice, options)} Valid: {', '.join(options)}."
    )


def _choices(group: str) -> list[str]:
    """List what ``group=`` can be, with the files of its folders as ``folder/file``."""
    loader = GlobalHydra.instance().config_loader()
    choices = loader.get_group_options(group, ObjectType.CONFIG)
    for folder in loader.get_group_options(group, ObjectType.GROUP):
        choices += [f"{folder}/{choice}" for choice in _choices(f"{group}/{folder}")]
    return choices


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith(SWEEP_WITHOUT_FLAG):
        return f"{lines[0]}. Add -m to run every value, or write [a,b] for a list."
    if isinstance(error, OverrideParseException):
        if error.override.partition("=")[2].startswith("~"):
            return f"{error.override}: the shell left ~ as it stands. Write the path out ($HOME)."
        return (
            f"{error.override}: this is not Hydra's override grammar ({lines[0]}). Quote values "
            "with spaces, brackets or other special characters: 'key=\"value\"'."
        )
    return " ".join(lines[:2])

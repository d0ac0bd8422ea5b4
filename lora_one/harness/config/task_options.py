"""What a benchmark can be told in ``dataset.*``: read from its class, checked before torch loads.

The keyword-only, annotated arguments of a task's ``__init__`` are its options. Those that every
``conf/dataset/*.yaml`` has (``DatasetConfig``) reach the task as well where it takes an argument of
that name, such as ``path`` or ``train_rows``.
"""

import inspect
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from lora_one.errors import InputError, nearest
from lora_one.tasks.registry import TASKS

# Strict, as the schema is; in JSON's types, so that a list may be a tuple and a string a Path.
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """Return the keyword-only arguments of a benchmark's class, by name."""
    signature = inspect.signature(TASKS[name].__init__)
    return {
        key: parameter
        for key, parameter in signature.parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def require_task(name: Any) -> None:
    """Raise InputError unless ``name`` is a benchmark of the registry."""
    if name not in TASKS:
        raise InputError(
            f"dataset.name={name}: no such benchmark.{nearest(str(name), TASKS)}"
            f" Valid: {', '.join(sorted(TASKS))}."
        )


def check_options(name: str, options: Mapping[str, Any], common: Mapping[str, Any]) -> None:
    """Check the options of a benchmark by name and by type.

    Args:
        name: A benchmark of the registry.
        options: The keys of the ``dataset`` section that are its own.
        common: The keys that every benchmark has.

    Raises:
        InputError: An option that this benchmark does not read, one of the wrong type or out of
            range, or one that it needs and was not given.
    """
    known = parameters(name)
    for key in options:
        if key not in known:
            raise InputError(_explain_unknown(name, key, [*common, *_own(name, common)]))
    for key, parameter in known.items():
        if key in options:
            _convert(name, key, options[key])
        elif key not in common and parameter.default is inspect.Parameter.empty:
            raise InputError(f"dataset.{key} is missing: give dataset.{key}=<value>.")
    _common_arguments(name, common)


def arguments(name: str, options: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that a checked ``dataset`` section means for the benchmark's class."""
    own = {key: _convert(name, key, value) for key, value in options.items()}
    return own | _common_arguments(name, common)


def path_options(name: str) -> list[str]:
    """Return the options that name a file or folder: those whose annotation admits a ``Path``."""
    hints = get_type_hints(TASKS[name].__init__)
    return [key for key in parameters(name) if Path in (hints[key], *get_args(hints[key]))]


def has_order(name: str) -> bool:
    """Tell whether a benchmark takes ``order``, and so brings its rows into order itself."""
    return "order" in parameters(name)


def _own(name: str, common: Mapping[str, Any]) -> list[str]:
    return [key for key in parameters(name) if key not in common]


def _common_arguments(name: str, common: Mapping[str, Any]) -> dict[str, Any]:
    """The common keys that the class takes, too; null means its default where it takes no null."""
    known = parameters(name)
    shared = {key: value for key, value in common.items() if key in known}
    return {
        key: _convert(name, key, value)
        for key, value in shared.items()
        if value is not None or _admits_null(name, key)
    }


@cache
def _adapter(name: str, key: str) -> TypeAdapter[Any]:
    hints = get_type_hints(TASKS[name].__init__, include_extras=True)
    return TypeAdapter(hints[key], config=_STRICT)


def _admits_null(name: str, key: str) -> bool:
    try:
        _adapter(name, key).validate_json("null")
    except ValidationError:
        return False
    return True


def _convert(name: str, key: str, value: Any) -> Any:
    try:
        return _adapter(name, key).validate_json(json.dumps(value))
    except ValidationError as error:
        details = error.errors()
        raise InputError(describe(f"dataset.{key}", value, details)) from error


def describe(key: str, value: Any, details: list[ErrorDetails]) -> str:
    """Say what was given for a key, what was expected, and which valid word is nearest."""
    # A union reports each of its branches: what they expect is joined.
    expected = [re.sub(r"^Input should be ", "", detail["msg"]) for detail in details]
    words = [word for text in expected for word in re.findall(r"'([^']+)'", text)]
    # null is an alternative worth a word only where nothing else would do.
    kept = [text for text in dict.fromkeys(expected) if text != "None"] or expected
    hint = nearest(value, words) if isinstance(value, str) else ""
    return f"{key}={shown(value)}: expected {' or '.join(kept)}.{hint}"


def shown(value: Any) -> str:
    """Write a value as a message does: null, a quoted string, or what Python prints."""
    return "null" if value is None else repr(value) if isinstance(value, str) else str(value)


def _explain_unknown(name: str, key: str, valid: list[str]) -> str:
    readers = [other for other in sorted(TASKS) if key in parameters(other)]
    if readers:
        return (
            f"dataset.{key} is read by dataset={' and '.join(readers)} only, not by {name}."
            f" Valid keys in dataset: {', '.join(valid)}."
        )
    return (
        f"dataset.{key}: nothing reads this key.{nearest(key, valid)}"
        f" Valid keys in dataset: {', '.join(valid)}."
    )

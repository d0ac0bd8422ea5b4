"""What ``Toy_Experiments.ipynb`` needs around its experiments: silence, one thread, tables."""

import inspect
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


def prepare() -> None:
    """Keep other libraries' notices out of the notebook, and sum on one thread.

    On one thread sums have one order: the same numbers on every run.
    """
    # Without ipywidgets tqdm falls back to text, and transformers' bars are off anyway.
    warnings.filterwarnings("ignore", message="IProgress not found")
    # bitsandbytes, which PEFT imports where it is installed, looks for a kernel nobody needs here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from lora_one.harness.console import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Table:
    """Rows with equal keys; notebooks show them as Markdown, terminals as the same text."""

    rows: Sequence[Mapping[str, Any]]

    def _repr_markdown_(self) -> str:
        names = list(self.rows[0])
        lines = [names, ["---"] * len(names)]
        lines += [[_cell(row[name]) for name in names] for row in self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def __repr__(self) -> str:
        return self._repr_markdown_()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def parameters(options: Mapping[str, Any], *functions: Callable[..., Any]) -> str:
    """Return options, and the functions' own values for the others, as one line of text."""
    values = dict(options)
    for function in functions:
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is not inspect.Parameter.empty:
                values.setdefault(name, parameter.default)
    return "parameters: " + ", ".join(f"{name} = {_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    if isinstance(value, range):
        return f"{value.start}..{value.stop - 1}" if len(value) > 1 else str(value.start)
    if isinstance(value, tuple):
        return "(" + ", ".join(_short(one) for one in value) + ")"
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, Path):
        return value.name
    return f"{value:g}" if isinstance(value, float) else str(value)

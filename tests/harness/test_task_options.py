"""What a benchmark is told is what its class says it reads: name, type, range."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from lora_one.errors import InputError
from lora_one.harness.config import task_options
from lora_one.tasks.registry import TASKS

COMMON = {"path": None, "train_rows": None, "test_rows": None, "seed": 3}


class Probe:
    """Stands for a task; only its arguments matter here."""

    name = "probe"

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        train_rows: int = 7,
        seed: int = 0,
        shots: Annotated[int, Field(ge=0, le=5)] = 0,
        metric: Literal["f1", "matthews"] | None = None,
        parts: tuple[str, ...] = (),
        share: float = 0.5,
        column: str,
    ) -> None:
        pass


@pytest.fixture(autouse=True)
def probe(monkeypatch):
    monkeypatch.setitem(TASKS, "probe", Probe)


def test_options_and_common_keys_reach_the_class_as_its_types():
    options = {"column": "text", "parts": ["a", "b"], "shots": 5, "share": 1}
    task_options.check_options("probe", options, COMMON)
    assert task_options.arguments("probe", options, COMMON) == {
        "column": "text",
        "parts": ("a", "b"),
        "shots": 5,
        "share": 1.0,
        "path": None,
        "seed": 3,
        # train_rows=null leaves the class its default; test_rows is none of its arguments.
    }
    given = task_options.arguments("probe", {"column": "x"}, {**COMMON, "train_rows": 2})
    assert given["train_rows"] == 2


BAD = {
    "too large": ({"column": "x", "shots": 6}, r"shots=6: expected less than or equal to 5\."),
    "no choice": ({"column": "x", "metric": "mathews"}, "expected 'f1' or 'matthews'. Did you"),
    "a word": ({"column": "x", "shots": "two"}, r"shots='two': expected a valid integer"),
    "true": ({"column": "x", "shots": True}, "shots=True: expected a valid integer"),
    "a number": ({"column": 3}, "column=3: expected a valid string"),
    "in a list": ({"column": "x", "parts": [1]}, r"parts=\[1\]: expected a valid string"),
    "infinite": ({"column": "x", "share": float("inf")}, "share=inf: expected a finite number"),
    "left out": ({}, "dataset.column is missing: give dataset.column=<value>"),
    "misspelt": ({"column": "x", "shot": 1}, "dataset.shot: nothing reads this key. Did you mean"),
    "another's": ({"column": "x", "order": "published"}, "is read by dataset=.*meta_math"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD.keys())
def test_what_the_class_does_not_take_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        task_options.check_options("probe", options, COMMON)


def test_null_is_taken_where_the_class_takes_it():
    task_options.check_options("probe", {"column": "x", "metric": None}, COMMON)
    with pytest.raises(InputError, match="shots=null: expected a valid integer"):
        task_options.check_options("probe", {"column": "x", "shots": None}, COMMON)


def test_options_of_files_and_folders_are_known():
    assert task_options.path_options("probe") == ["path"]
    assert task_options.path_options("meta_math") == ["path", "test_path"]


def test_the_published_filter_gets_the_runs_numbers_of_rows(compose):
    """MetaMathQA selects while it reads, so its class takes train_rows and validation_rows."""
    dataset = compose("dataset=meta_math", "dataset.train_rows=5").dataset
    given = task_options.arguments("meta_math", dataset.options, dataset.common)
    assert (given["train_rows"], given["validation_rows"]) == (5, 10_000)
    assert (given["order"], given["max_tokens"]) == ("published", 512)
    assert task_options.has_order("meta_math")
    assert not task_options.has_order("gsm8k")


def test_the_registry_imports_nothing_heavy():
    """Every configuration is checked against it, before torch is loaded."""
    import subprocess
    import sys

    heavy = "torch", "numpy", "datasets", "sklearn", "pandas", "transformers", "pyarrow", "scipy"
    code = f"import sys, lora_one.tasks.registry; assert not set(sys.modules) & set({heavy})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])

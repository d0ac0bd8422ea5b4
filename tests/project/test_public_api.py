"""The public names: they exist, are documented, and are the ones that docs/api.md lists."""

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path

import pytest

import lora_one

ROOT = Path(__file__).parents[2]
SECTION = r"^{}:\n(.*?)(?=^\w+:$|\Z)"


def declares_all(file):
    body = ast.parse(file.read_text(encoding="utf-8")).body
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    return any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets)


def module_name(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PUBLIC = [module_name(f) for f in sorted((ROOT / "lora_one").rglob("*.py")) if declares_all(f)]


def section(name, subject):
    """The section of a docstring in Google's convention, or None."""
    found = re.search(SECTION.format(name), inspect.getdoc(subject), re.MULTILINE | re.DOTALL)
    return found and found.group(1)


def raises_itself(function):
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(isinstance(node, ast.Raise) for node in ast.walk(tree))


def test_the_packages_that_state_their_names_are_found():
    assert {"lora_one", "lora_one.evaluation", "lora_one.tasks"} <= set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_in_all_exists_once_and_is_documented(name):
    module = import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        subject = getattr(module, public)
        if inspect.isclass(subject) or inspect.isfunction(subject):
            # A dataclass without a docstring gets its signature for one.
            assert " " in (subject.__doc__ or "").removeprefix(f"{public}("), f"{name}.{public}"


def test_dir_is_the_documented_list():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert len(set(documented)) == len(documented)
    assert dir(lora_one) == sorted(documented)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'initialise'"):
        lora_one.initialise  # noqa: B018 (the attribute is what is tested)


@pytest.mark.parametrize("name", lora_one.__all__)
def test_a_docstring_has_every_argument_the_result_and_the_errors(name):
    subject = getattr(lora_one, name)
    if is_dataclass(subject):
        described = section("Attributes", subject)
        assert all(f"{field.name}:" in described for field in fields(subject))
    if inspect.isfunction(subject):
        signature = inspect.signature(subject)
        described = section("Args", subject)
        assert all(f"    {parameter}:" in described for parameter in signature.parameters)
        assert section("Returns", subject)
        assert section("Raises", subject) or not raises_itself(subject)


IMPORTS = """
import sys
{first}
before = set(sys.modules)
import lora_one
{then}
print(*sorted(set(sys.modules) - before))
"""


def imported(first="", then=""):
    """Modules that a fresh interpreter imports for lora_one, beyond those imported first."""
    answer = subprocess.run(
        [sys.executable, "-c", IMPORTS.format(first=first, then=then)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(answer.stdout.split())


def test_the_import_brings_none_of_its_modules_and_no_other_package():
    modules = imported(first="import importlib, typing")
    assert modules == {"lora_one"}


def test_all_public_names_bring_only_our_core_once_torch_and_peft_are_there():
    modules = imported("import torch, peft", "[getattr(lora_one, n) for n in lora_one.__all__]")
    assert {name.split(".")[0] for name in modules} == {"lora_one"}
    layers = {name.split(".")[1] for name in modules if "." in name}
    assert not layers & {"evaluation", "harness", "reports", "tasks", "theory"}
    assert {"adapters", "gradients", "numerics", "optimizers"} <= layers

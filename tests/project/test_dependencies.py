"""What pyproject.toml declares, requirements.txt pins and the code imports agree."""

import ast
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import lora_one

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]

# What a part of the package may import besides torch and PEFT.
EXTRA_OF = {
    "adapters": [],
    "gradients": [],
    "numerics": [],
    "evaluation": ["harness", "evaluation"],
    "harness": ["harness"],
    "plot_style": ["reports"],
    "reports": ["reports"],
    "snapshots": ["harness"],
    "tasks": ["harness", "evaluation"],
    "theory": ["notebook"],
}
# Imports whose distribution has another name, or comes with another one.
NAME_OF = {"PIL": "pillow", "hydra": "hydra-core", "sklearn": "scikit-learn", "yaml": "pyyaml"}
COMES_WITH = {
    "huggingface-hub": "peft",
    "numpy": "peft",
    "pydantic-core": "pydantic",
    "safetensors": "peft",
}
# Imported inside functions only, where a user asks for them by name; no extra installs them.
BROUGHT_BY_THE_USER = {"deepspeed", "vllm"}


def parsed(lines):
    """Requirements by canonical name; extras of this project are followed."""
    found = {}
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT["name"]:
            for extra in requirement.extras:
                found |= parsed(EXTRAS[extra])
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def pins(*files):
    lines = [line for f in files for line in (ROOT / f).read_text(encoding="utf-8").splitlines()]
    return {
        name: Version(next(iter(requirement.specifier)).version)
        for name, requirement in parsed(
            line for line in lines if line and not line.startswith("#")
        ).items()
    }


PINS = pins("requirements.txt", "requirements-dev.txt")
CORE = parsed(PROJECT["dependencies"])
EVERYTHING = CORE | parsed(EXTRAS["dev"])
TRIED = {*CORE, *parsed(EXTRAS["reports"])}  # by scripts/check_versions.py


def imports(file):
    """Third-party distributions a file imports, with whether that is inside a function."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    at_top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        else:
            continue
        for name in names:
            package = name.split(".")[0]
            if package not in {"lora_one", *sys.stdlib_module_names}:
                yield canonicalize_name(NAME_OF.get(package, package)), id(node) not in at_top


def closure(lines):
    """Distributions that installing these requirements brings, as far as they are here to ask."""
    found, waiting = set(), [Requirement(line) for line in lines]
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), {"", *requirement.extras}
        if (name, *sorted(extras)) in found:
            continue
        found.add((name, *sorted(extras)))
        try:
            needed = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:
            continue
        waiting += [
            r
            for r in needed
            if not r.marker or any(r.marker.evaluate({"extra": e}) for e in extras)
        ]
    return {name for name, *_ in found}


def part_of(file):
    return file.relative_to(ROOT / "lora_one").parts[0].removesuffix(".py")


FILES = sorted((ROOT / "lora_one").rglob("*.py"))


def test_the_library_brings_torch_and_peft_and_what_they_need_only():
    assert {"torch", "peft"} <= set(CORE)
    assert closure(PROJECT["dependencies"]) == closure(["torch", "peft"])


@pytest.mark.parametrize("part", sorted({part_of(file) for file in FILES}))
def test_what_is_imported_is_declared(part):
    allowed = set(CORE)
    for extra in EXTRA_OF.get(part, []):
        allowed |= set(parsed(EXTRAS[extra]))
    allowed |= {name for name, parent in COMES_WITH.items() if parent in allowed}
    for file in FILES:
        if part_of(file) != part:
            continue
        for name, is_late in imports(file):
            if not (is_late and name in BROUGHT_BY_THE_USER):
                assert name in allowed, f"{file.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize(("name", "parent"), COMES_WITH.items())
def test_what_comes_with_a_package_is_required_by_it_always(name, parent):
    lines = [line for line in requires(parent) if "extra ==" not in line]
    assert name in {canonicalize_name(Requirement(line).name) for line in lines}


def test_every_declared_package_is_pinned_and_every_pin_is_declared():
    assert set(PINS) == set(EVERYTHING)


@pytest.mark.parametrize("name", sorted(PINS))
def test_a_pin_is_an_allowed_version(name):
    assert PINS[name] in EVERYTHING[name].specifier


@pytest.mark.parametrize("name", sorted(set(EVERYTHING) - TRIED))
def test_no_version_is_claimed_that_nothing_tests(name):
    """Lower bounds that check_versions.py does not try are those of the pinned versions."""
    (bound,) = EVERYTHING[name].specifier
    assert bound.operator == ">="
    release = Version(bound.version).release
    assert PINS[name].release[: len(release)] == release


def test_the_readme_states_the_lowest_python():
    lowest = re.fullmatch(r">=(3\.\d+)", PROJECT["requires-python"]).group(1)
    assert f"Python {lowest} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Python {lowest} or newer" in (ROOT / "Makefile").read_text(encoding="utf-8")
    tested = [c for c in PROJECT["classifiers"] if c.startswith("Programming Language :: Python")]
    assert f"Programming Language :: Python :: {lowest}" in tested


def test_the_version_is_the_same_everywhere():
    assert lora_one.__version__ == PROJECT["version"]

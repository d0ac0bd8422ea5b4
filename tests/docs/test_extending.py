"""docs/extending.md, followed to the letter in a copy of the repository."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from .pages import ROOT, blocks
from .warm import Warm

PAGE = ROOT / "docs" / "extending.md"
COPIED = ("conf", "lora_one", "data/arithmetic", "data/tiny_llama", "tests", "scripts", "docs")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy") / "repository"
    without = shutil.ignore_patterns("__pycache__")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=without)
    for name in ("run_exp.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def apply(block, folder):
    """Do what a block with a file's name says; return the file if it was there already."""
    name = re.fullmatch(r'title="([^"]+)"', block.info)[1]
    file = folder / name
    if block.language == "diff":
        lines = block.text.splitlines()
        before = "".join(f"{line[1:]}\n" for line in lines if line[0] == " ")
        after = "".join(f"{line[1:]}\n" for line in lines)
        text = file.read_text()
        assert text.count(before) == 1, f"{block}: not once in {name}:\n{before}"
        file.write_text(text.replace(before, after))
        return name
    if file.exists():
        file.write_text(f"{file.read_text().rstrip()}\n\n\n{block.text}")
        return name
    file.write_text(block.text)
    return None


def test_what_the_page_adds_passes_its_tests_and_runs(copy):
    changed = set()
    python = Warm(copy)
    for block in blocks(PAGE):
        if block.language != "bash":
            changed.add(apply(block, copy))
            continue
        for command in re.split(r"\n(?=python )", block.text.replace("\\\n", " ").strip()):
            status, said = python.run(command)
            assert status == 0, f"{block}: {command}\n{said}"
            assert "pytest" not in command or "passed" in said
    python.close()
    # One line in each registry, one function, and nothing else that was there is touched.
    assert changed - {None} == {
        "lora_one/numerics/factors.py",
        "lora_one/numerics/methods.py",
        "lora_one/tasks/registry.py",
    }
    records = [json.loads(file.read_text()) for file in copy.glob("results/try/*/run.json")]
    assert {record["status"] for record in records} == {"finished"}
    assert sorted(record["method"] for record in records) == [
        "grad_a",
        "grad_a",
        "lora",
        "lora_one",
    ]
    check = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--no-cache",
        *(name for name in changed if name),
    ]
    new = ["tests/core/test_grad_a.py", "lora_one/tasks/reverse.py", "tests/tasks/test_reverse.py"]
    answer = subprocess.run([*check, *new], cwd=copy, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout

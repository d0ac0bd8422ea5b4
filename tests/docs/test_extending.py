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
    """Do what a block below a file's name says; return whether the file was there already."""
    file = folder / block.file
    if block.language == "diff":
        lines = block.text.splitlines()
        before = "".join(f"{line[1:]}\n" for line in lines if line[0] == " ")
        after = "".join(f"{line[1:]}\n" for line in lines)
        text = file.read_text()
        assert text.count(before) == 1, f"{block}: not once in {block.file}:\n{before}"
        file.write_text(text.replace(before, after))
        return True
    was_there = file.exists()
    before = f"{file.read_text().rstrip()}\n\n\n" if was_there else ""
    file.write_text(before + block.text)
    return was_there


def test_what_the_page_adds_passes_its_tests_and_runs(copy):
    new, changed = set(), set()
    python = Warm(copy)
    for block in blocks(PAGE):
        if block.file:
            (changed if apply(block, copy) else new).add(block.file)
            continue
        assert block.language == "bash", f"{block}: of which file?"
        for command in re.split(r"\n(?=python )", block.text.replace("\\\n", " ").strip()):
            status, said = python.run(command)
            assert status == 0, f"{block}: {command}\n{said}"
            assert "pytest" not in command or "passed" in said
    python.close()
    # One function and one line in each registry, and nothing else that was there is touched.
    assert changed == {
        "lora_one/numerics/factors.py",
        "lora_one/numerics/methods.py",
        "lora_one/tasks/registry.py",
    }
    records = [json.loads(file.read_text()) for file in copy.glob("results/try/*/run.json")]
    assert {record["status"] for record in records} == {"finished"}
    methods = sorted(record["method"] for record in records)
    assert methods == ["grad_a", "grad_a", "lora", "lora_one"]
    code = [file for file in (*changed, *new) if file.endswith(".py")]
    answer = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", *code],
        cwd=copy,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout

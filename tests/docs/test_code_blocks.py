"""Every code block of the pages does something: it is executed, composed or parsed here.

A block in another language, or one that cannot be checked, needs a line in ``AS_THEY_ARE``.
"""

import argparse
import ast
import copy
import json
import re
import runpy
import sys
import tomllib
from functools import cache
from itertools import pairwise
from pathlib import Path
from textwrap import dedent

import peft
import pytest
import torch
import transformers
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

import lora_one
from lora_one.harness.cli import HYDRA_FLAGS, SWEEP_FLAGS
from lora_one.harness.config.compose import compose_config, composer
from lora_one.harness.config.published import translate

from .pages import ROOT, blocks, name_of, pages
from .shell import SYSTEM, Shell

# Followed as a whole by a test of its own.
FOLLOWED = {"docs/extending.md": "test_extending.py"}
# (page, how the block begins) -> why there is nothing to run
AS_THEY_ARE = {
    ("README.md", "method    optimiser"): "what make run prints",
    ("README.md", "results/<dataset>"): "a run folder; test_run.py holds the run to it",
    ("README.md", "run_exp.py "): "a file tree; checked below",
    ("README.md", "@inproceedings"): "BibTeX",
    ("docs/adapters.md", "method     lora_one"): "what inspect prints",
    ("docs/adapters.md", "model = get_peft_model"): "PEFT's way and ours, one or the other",
    ("docs/offline.md", "error: the model"): "a message; test_prepare.py holds the run to it",
    ("docs/rank-allocation.md", "max "): "a formula",
    ("docs/slurm.md", "srun --ntasks-per-node=1 bash"): "a pattern, with ... for the rest",
}
PARSERS = {
    "diff": lambda text: ast.parse(dedent(re.sub("^.", "", text, flags=re.MULTILINE))),
    "json": json.loads,
    "toml": tomllib.loads,
    "yaml": yaml.safe_load,
}
COMPOSED = ("run_exp.py", "scripts/prepare.py")
FOREIGN = {"llama.cpp/convert_lora_to_gguf.py": "of llama.cpp"}
MODULES = {"mkdocs": "test_site.py builds the site", "venv": "Python's own"}
BLOCKS = [block for page in pages() for block in blocks(page) if name_of(page) not in FOLLOWED]


class Parsed(BaseException):
    """A script has read its arguments, and does no more."""


def of(page, *languages):
    return [block for block in BLOCKS if block.page == page and block.language in languages]


def pages_with(*languages):
    return list(dict.fromkeys(block.page for block in BLOCKS if block.language in languages))


def is_left(block):
    return any(page == block.page and block.text.startswith(start) for page, start in AS_THEY_ARE)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_is_checked_or_listed(block):
    if is_left(block):
        return
    assert block.language in ("bash", "python", *PARSERS), f"{block}: nothing checks it"
    if block.language in PARSERS:
        assert PARSERS[block.language](block.text) is not None


def test_every_block_that_is_left_as_it_is_is_there():
    for page, start in AS_THEY_ARE:
        assert any(block.text.startswith(start) for block in BLOCKS if block.page == page), start


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the pages' examples name, as the current one."""
    (tmp_path / "path" / "to").mkdir(parents=True)
    model, adapter = (tmp_path / "path" / "to" / name for name in ("folder", "adapter"))
    for name in ("merged", "folder"):
        (tmp_path / "path" / "to" / name).symlink_to(ROOT / "data" / "tiny_llama")
    adapter.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(model)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (adapter / "adapter_model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", pages_with("bash"))
def test_every_shell_command_is_understood(page, workplace):
    (workplace / "shell").mkdir()
    shell = Shell(workplace / "shell")
    with composer(ROOT / "conf"):
        for call in shell.run([(str(block), block.text) for block in of(page, "bash")]):
            check(call, call.program, call.arguments, shell)


def check(call, program, arguments, shell):
    """Check one command; what a launcher starts is a command."""
    match program:
        case "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(arguments) <= set(targets), call
        case "srun" | "torchrun" | "accelerate":
            start = next(at for at, word in enumerate(arguments) if is_program(word))
            for option, value in pairwise(arguments):
                assert option != "--config_file" or (ROOT / value).is_file(), call
            if arguments[start].endswith(".py"):
                check(call, "python", arguments[start:], shell)
            else:
                check(call, arguments[start], arguments[start + 1 :], shell)
        case "sbatch":
            script = (shell.folder / arguments[-1]).read_text()
            for inner in shell.run([(call.block, f"ROWS=\n{script}")]):
                check(inner, inner.program, inner.arguments, shell)
        case "python" | "python3":
            check_python(call, arguments)
        case _:
            assert program in SYSTEM, f"{call}: who knows {program}?"


def is_program(word):
    return word in ("python", "torchrun") or word.endswith(".py")


def check_python(call, arguments):
    script, *rest = arguments
    if script in COMPOSED:
        composes(rest)
    elif script == "-m" and rest[0] == "pytest":
        paths = [word for word in rest[1:] if "/" in word]
        assert all((ROOT / path.partition("::")[0]).exists() for path in paths), call
    elif script == "-m":
        assert rest[0] in MODULES or parses(rest[0], rest[1:], is_module=True), call
    elif script == "-c":
        compile(rest[0], str(call), "exec")
    elif script not in FOREIGN:
        assert "ArgumentParser" in (ROOT / script).read_text(), f"{call}: it parses nothing"
        assert parses(script, rest, is_module=False), call


def composes(arguments):
    """Compose what a command line means; of a sweep, each value once."""
    overrides = [word for word in arguments if word not in {*SWEEP_FLAGS, *HYDRA_FLAGS, "job"}]
    parsed = OverridesParser.create().parse_overrides(overrides)
    points = BasicSweeper.split_arguments(parsed, None)[0]
    assert len(points) == 1 or SWEEP_FLAGS & set(arguments)
    seen = set()
    for point in points:
        if not set(point) <= seen:
            seen |= set(point)
            compose_once(tuple(point))


@cache
def compose_once(point):
    dataset = compose_config(translate(point)[0]).dataset
    if dataset.name == "custom" and Path(dataset.path or "").suffix:
        assert dataset.options["test_path"], f"{point}: a file of training rows has no test rows"


def parses(name, arguments, *, is_module):
    """Tell whether a script or module understands its arguments; it does nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        original = argparse.ArgumentParser.parse_args

        def parse(parser, *given, **options):
            original(parser, *given, **options)
            raise Parsed

        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(sys, "argv", [name, *arguments])
        patch.syspath_prepend(str(ROOT / "scripts"))
        try:
            if is_module:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / name), run_name="__main__")
        except Parsed:
            return True
        except SystemExit:
            return False
    return False


@pytest.fixture(scope="session")
def tiny():
    """The embedded model and its tokenizer, as the pages' ``base`` and ``tokenizer``."""
    folder = ROOT / "data" / "tiny_llama"
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("page", pages_with("python"))
def test_every_python_block_runs(page, tiny, workplace):
    """In the order of the page, in one namespace that holds what the pages say they assume."""
    base, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    rows = tokenizer(["Tom has 2 apples.", "Ann has 12 pens."], return_tensors="pt", padding=True)
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    names = {
        "LoraConfig": peft.LoraConfig,
        "base": base,
        "batches": [{**rows, "labels": labels}],
        "get_peft_model": peft.get_peft_model,
        "lora_one": lora_one,
        "tokenizer": tokenizer,
        "torch": torch,
    }
    for block in of(page, "python"):
        code = compile("\n" * block.line + block.text, page, "exec")
        if not is_left(block):
            exec(code, names)  # noqa: S102 -- our own pages


def test_the_file_tree_of_the_readme_is_that_of_the_repository():
    (tree,) = (block.text for block in of("README.md", "") if block.text.startswith("run_exp.py "))
    for line in tree.splitlines():
        folder = ROOT / "lora_one" if line.startswith(" ") else ROOT
        assert (folder / line.split()[0]).exists(), f"{line}: not in {folder.name}"


def test_a_command_that_nobody_knows_is_noticed(tmp_path):
    shell = Shell(tmp_path)
    assert [str(call) for call in shell.run([("a", "X='b c'\npython d \"$X\" # e")])] == [
        "a: python d b c"
    ]
    for text in ("frobnicate", "python $UNSET", "run_exp.py"):
        with pytest.raises(AssertionError):
            shell.run([("a", text)])

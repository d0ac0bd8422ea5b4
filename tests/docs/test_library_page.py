"""docs/library.md names the arguments and defaults that the functions have."""

import inspect
import re

import pytest

import lora_one
from lora_one.harness.config.schema import Config
from lora_one.numerics.methods import METHODS

from .pages import ROOT, name_of, pages

PAGE = (ROOT / "docs" / "library.md").read_text()
FUNCTIONS = [name for name in lora_one.__all__ if inspect.isfunction(getattr(lora_one, name))]
SECTIONS = [name for name in FUNCTIONS if f"\n## {name}\n" in PAGE]
REFERENCE = (ROOT / "docs" / "configuration.md").read_text()
KEY = re.compile(rf"`((?:{'|'.join(Config.model_fields)})\.[a-z_]+)(?:=[^`]*)?`")
# Keys of the official repositories, which the command line translates or drops.
OFFICIAL = {"init.weight", "init.mode", "model.prec_reg", "model.saving", "peft.use_loraplus"}
# Files of a run and of a report, and attributes of objects in examples.
NO_KEYS = {"init.json", "comparison.md", "optimizer.reg", "optimizer.unpreconditioned"}


def test_every_public_function_is_documented_somewhere():
    text = "".join(page.read_text() for page in pages())
    assert len(SECTIONS) >= 6
    assert [name for name in FUNCTIONS if f"`{name}" not in text and name not in SECTIONS] == []


@pytest.mark.parametrize("name", SECTIONS)
def test_the_table_of_a_function_has_its_arguments_in_order(name):
    section = PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    table = re.findall(r"^\| `(\w+)` \| (?:`(.*?)`)? ?\|", section, re.MULTILINE)
    given = inspect.signature(getattr(lora_one, name)).parameters.values()
    empty = inspect.Parameter.empty
    assert table == [(p.name, "" if p.default is empty else repr(p.default)) for p in given]


def test_the_methods_that_the_page_lists_are_those_of_the_registry():
    listed = re.search(r"^\| `method` \| \| (.*) \|$", PAGE, re.MULTILINE)[1]
    assert set(re.findall(r"`(\w+)`", listed)) == set(METHODS)


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_every_key_that_a_page_names_is_one(page):
    known = set(re.findall(r"^\| `([\w.]+)` \|", REFERENCE, re.MULTILINE))
    assert set(KEY.findall(page.read_text())) <= known | OFFICIAL | NO_KEYS

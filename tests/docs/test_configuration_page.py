"""docs/configuration.md is what scripts/config_reference.py writes, and what it says is so."""

import re
import subprocess
import sys
from functools import cache

import pytest

from lora_one.harness.config.compose import compose_config, composer
from lora_one.harness.config.schema import GROUPS

from .pages import ROOT

PAGE = ROOT / "docs" / "configuration.md"
ROW = re.compile(r"^\| `([\w.]+)` \| (.*) \| `(.*?)` \| (.*) \|$", re.MULTILINE)


@cache
def written() -> str:
    """Return what the script writes, without touching the committed page."""
    code = "import config_reference; print(config_reference.page(), end='')"
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        encoding="utf-8",
        check=False,
        cwd=ROOT / "scripts",
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def choice_rows(group):
    """Return each choice of a group with what the page says it sets."""
    section = written().partition(f"\n## {group}\n")[2].partition("\n## ")[0]
    table = section.partition(f"| `{group}=` |")[2]
    rows = re.findall(r"^\| `([\w/]+)` \| (.*?) \|(?: (.*) \|)?$", table, re.MULTILINE)
    return {name: re.findall(r"`([^`]+)`", sets) for name, _, sets in rows}


def test_the_committed_page_is_what_the_script_writes():
    assert PAGE.read_text(encoding="utf-8") == written(), "run: make docs"


def test_every_key_and_every_choice_is_there_and_said_what_it_is():
    told = {key for key, *_ in ROW.findall(written())}
    with composer(ROOT / "conf"):
        for overrides in (
            [],
            ["optimizer=loraplus", "launcher=slurm_1gpu", "dataset=meta_math"],
            ["optimizer=riemannian", "dataset=mmlu"],
        ):
            untold = set(flat(compose_config(overrides).model_dump())) - told
            assert all(f"\n## {section}\n" in written() for section in untold)
    assert all(meaning.strip() for *_, meaning in ROW.findall(written()))
    for group in GROUPS:
        files = {
            file.relative_to(ROOT / "conf" / group).with_suffix("").as_posix()
            for file in (ROOT / "conf" / group).rglob("*.yaml")
        }
        assert set(choice_rows(group)) == files
    assert not re.search(r"^\| `[\w/]+` \|\s+\|", written(), re.MULTILINE), "a file says nothing"


def flat(settings, prefix=""):
    for key, value in settings.items():
        if isinstance(value, dict) and key != "additional":
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_the_defaults_of_the_page_given_by_hand_are_the_default_run():
    """The first row of a key is that of the default choice."""
    defaults = dict(reversed([(key, value) for key, _, value, _ in ROW.findall(written())]))
    with composer(ROOT / "conf"):
        default = compose_config([])
        keys = set(flat(default.model_dump()))
        given = [f"{key}={value}" for key, value in defaults.items() if key in keys]
        assert len(given) > 60
        assert compose_config(given) == default


@pytest.mark.parametrize(
    ("group", "choice"), [("model", "llama"), ("peft", "dora"), ("init", "svd")]
)
def test_what_a_choice_is_said_to_set_by_hand_is_that_choice(group, choice):
    """But for the architecture, which the page leaves out."""
    sets = [f"{group}.{override}" for override in choice_rows(group)[choice]]
    with composer(ROOT / "conf"):
        by_hand, chosen = compose_config(sets), compose_config([f"{group}={choice}"])
    left_out = {"architecture": None}
    assert by_hand.model_dump()[group] | left_out == chosen.model_dump()[group] | left_out

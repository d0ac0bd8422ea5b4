"""The card beside an exported adapter says what it is, and the hub can read its front matter."""

import shutil
from pathlib import Path

import pytest
import yaml
from fake_hub import Repository
from huggingface_hub import constants

import lora_one
from lora_one.adapters.stored import read_stored
from lora_one.harness.card import licence, write_card
from lora_one.numerics.methods import METHODS


def read_card(folder: Path) -> tuple[dict, str]:
    _, front_matter, text = (folder / "adapter" / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front_matter), text


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_runs_card(small, run, llama_folder, hub, tmp_path):
    base = shutil.copytree(llama_folder, tmp_path / "base")
    (base / "README.md").write_text("---\nlanguage: en\nlicense: llama2\n---\n# A base\n")
    config = small(f"model.name={base}", "init=pissa")
    record = run(config)
    folder = Path(config.output_dir) / record["run_id"]
    front_matter, text = read_card(folder)
    # The hub knows its own models only, and this base is a folder.
    assert front_matter == {
        "library_name": "peft",
        "license": "llama2",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "peft", "lora-one-lab", "pissa"],
    }
    for line in (
        f"A plain LoRA of rank 8 for the untouched `{base}`. It was started with **PiSSA**",
        f"| start | {METHODS['pissa'].equation.replace('``', '`')} |",
        f"| source | {METHODS['pissa'].source} |",
        "| scaling | alpha / sqrt(r), alpha = 16, r = 4 |",
        f"| base weights | `{record['model']['fingerprint']}` |",
        "| licence of the base | llama2 |",
        "| training rows | 16 |",
        "| steps | 2 |",
        "of 6 test rows |",
        f"| code | lora-one {lora_one.__version__}",
        f"```bash\n{record['command']}\n```",
    ):
        assert line in text
    assert "stable gamma" not in text
    assert read_stored(folder / "adapter").origin["method"] == "pissa"

    # With two replies to each row.
    write_card(config, folder, record | {"metrics": record["metrics"] | {"n": 12}})
    assert "of 6 test rows |" in read_card(folder)[1]

    # A trial of a comparison asks no test row.
    trial = {"primary_metric": "validation_loss", "metrics": {"validation_loss": 2.5, "n": 3}}
    write_card(config, folder, record | trial)
    assert "test rows" not in read_card(folder)[1]
    assert "| validation loss | 2.5000 |" in read_card(folder)[1]

    # The same run of a base and rows of the hub, whose card is in the cache.
    of_hub = config.model_copy(
        update={"model": config.model.model_copy(update={"name": "org/base"})}
    )
    record["data"]["sources"] = {"train": {"hub": "org/rows"}, "test": {"a": {"hub": "org/more"}}}
    write_card(of_hub, folder, record)
    assert "license" not in read_card(folder)[0]
    assert "| licence of the base | see its card |" in read_card(folder)[1]
    files = {"README.md": b"---\nlicense: 'apache-2.0'\n---\n", "config.json": b"{}"}
    Repository("model", "org/base", files).fill_cache(hub)
    write_card(of_hub, folder, record)
    front_matter, _ = read_card(folder)
    assert front_matter["license"] == "apache-2.0"
    assert (front_matter["base_model"], front_matter["base_model_relation"]) == (
        "org/base",
        "adapter",
    )
    assert front_matter["datasets"] == ["org/more", "org/rows"]


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: mit\n---\nAm\xe9lie's\n", "mit"),
        ('---\ntags: [a]\nlicense: "cc-by-4.0" \n---\n', "cc-by-4.0"),
        ("---\ntags: [a]\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("---\nlicense:\n- mit\n---\n", None),
        (None, None),
    ],
)
def test_the_licence_is_read_from_the_front_matter_only(card, expected, tmp_path):
    if card is not None:
        (tmp_path / "README.md").write_text(card, encoding="latin-1")
    assert licence(str(tmp_path), None) == expected

"""Preparing on a machine with a network, running on one without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import HubServer, Repository
from huggingface_hub import constants

from lora_one.errors import InputError, NotPreparedError
from lora_one.harness.cli import prepare_command
from lora_one.harness.data.prepare import prepare_all
from lora_one.harness.dry_run import foresee
from lora_one.harness.models.base import find_base
from lora_one.harness.models.files import fetch_model, model_is_here
from lora_one.harness.plan import make_plan

ROOT = Path(__file__).parents[2]
README = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
---
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture(scope="session")
def model_repository(llama_folder) -> Repository:
    """The tiny Llama as a repository, weights in two shards, with what else lies about there."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    folder = llama_folder.parent / "sharded"
    model.save_pretrained(folder, max_shard_size="20kB")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    tokenizer = ("tokenizer.json", "tokenizer_config.json")
    files |= {name: (llama_folder / name).read_bytes() for name in tokenizer}
    files |= {"pytorch_model.bin": b"pickled", "consolidated.safetensors": b"again"}
    assert sum(name.startswith("model-") for name in files) >= 2
    return Repository("model", "org/tiny", files | {"onnx/model.onnx": b"", "README.md": b"card"})


@pytest.fixture(scope="session")
def rows_repository(rows_folder) -> Repository:
    lines = (rows_folder / "train.jsonl").read_bytes().splitlines(keepends=True)
    files = {
        "README.md": README.encode(),
        "main/train-00000-of-00002.jsonl": b"".join(lines[:24]),
        "main/train-00001-of-00002.jsonl": b"".join(lines[24:]),
        "main/test-00000-of-00001.jsonl": (rows_folder / "test.jsonl").read_bytes(),
    }
    return Repository("dataset", "openai/gsm8k", files)


@pytest.fixture
def overrides(rows_repository, tmp_path):
    return [
        "dataset=gsm8k",
        "model.name=org/tiny",
        f"dataset.revision={rows_repository.commit}",
        "dataset.held_out_rows=8",
        "dataset.max_new_tokens=4",
        "model.max_steps=2",
        "model.real_batch_size=8",
        "model.per_device_batch_size=4",
        "peft.lora_r=4",
        "init=lora",
        f"output_dir={tmp_path / 'results'}",
    ]


def test_a_run_takes_the_tokens_that_an_earlier_one_left(small, run):
    fresh = make_plan(small()).data
    assert set(fresh.splits.fresh) == set(fresh.splits.keys.values())
    record = run(small())
    cached = make_plan(small("model.learning_rate=1e-3")).data
    assert not cached.splits.fresh
    assert list(cached.train.rows) == fresh.train.rows
    assert cached.facts == fresh.facts
    assert record["data"]["train_row_ids_sha256"] == cached.facts["train_row_ids_sha256"]


def test_a_run_from_the_cache_learns_the_same(small, run):
    fresh, cached = run(small("init=lora")), run(small("init=lora", "model.logging_steps=1"))
    assert fresh["run_id"] != cached["run_id"]
    for name in ("base_validation", "start_validation", "validation"):
        assert fresh["losses"][name] == cached["losses"][name]


def test_another_limit_seed_or_tokenizer_has_entries_of_its_own(small, run, copy_of, llama_folder):
    run(small())
    for override in ("dataset.seed=1", "model.max_length=300", "dataset.train_rows=15"):
        assert make_plan(small(override)).data.splits.fresh
    changed = copy_of(llama_folder)
    tokenizer = json.loads((changed / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert make_plan(small(f"model.name={changed}")).data.splits.fresh


def test_changed_rows_are_tokenised_again_with_a_word(small, copy_of, rows_folder, capsys, run):
    rows = copy_of(rows_folder)
    run(small(f"dataset.path={rows}"))
    lines = (rows / "train.jsonl").read_text().splitlines()
    (rows / "train.jsonl").write_text("\n".join(lines[1:]) + "\n")
    assert make_plan(small(f"dataset.path={rows}")).data.splits.fresh
    said = capsys.readouterr().out
    assert "train.jsonl has changed since it was tokenised; tokenising the train rows again" in said


def test_planning_writes_nothing(small, tmp_path):
    foresee(small())
    make_plan(small())
    assert not (tmp_path / "results").exists()


def test_local_folders_are_prepared_and_the_table_says_what_is_where(small, capsys):
    config = small()
    prepare_all([config, small("model.learning_rate=1e-3")])
    said = capsys.readouterr().out
    assert said.count("model /") == 2  # the announcement and the table: once for two runs
    for part in ("rows 1 of 1", "tokens train, 16 rows", "tokens validation, 8 rows", "prepared:"):
        assert part in said
    assert not make_plan(config).data.splits.fresh


def test_what_cannot_be_planned_is_not_prepared(small, copy_of, llama_folder, capsys):
    broken = copy_of(llama_folder)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        prepare_all([small(f"model.name={broken}")])
    assert "prepared" not in capsys.readouterr().out


def test_only_what_a_run_reads_counts_as_the_model(hub, model_repository, compose):
    model = compose("model.name=org/tiny").model
    unread = {"pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx", "README.md"}
    model_repository.fill_cache(hub, set(model_repository.files) - unread)
    assert model_is_here(model)
    assert not set(fetch_model(model).names) & unread
    assert find_base(model).available_offline


def test_a_missing_file_of_the_model_is_noticed(hub, model_repository, compose):
    model = compose("model.name=org/tiny").model
    for name in ("config.json", "tokenizer.json", "model-00002-of", "model.safetensors.index.json"):
        (gone,) = [file for file in model_repository.files if file.startswith(name)]
        model_repository.fill_cache(hub / gone, set(model_repository.files) - {gone})
        constants.HF_HUB_CACHE = str(hub / gone)
        assert not model_is_here(model)
        with pytest.raises(NotPreparedError, match=f"in part only: {gone}"):
            find_base(model)


def test_a_shard_cut_short_is_noticed_with_and_without_a_listing(hub, model_repository, compose):
    model = compose("model.name=org/tiny").model
    for listing in (True, False):
        constants.HF_HUB_CACHE = str(hub / str(listing))
        snapshot = model_repository.fill_cache(hub / str(listing), listing=listing)
        assert model_is_here(model)
        (shard,) = snapshot.glob("model-00002-of-*")
        shard.resolve().write_bytes(shard.read_bytes()[:-1])
        assert not model_is_here(model)


def test_a_repository_without_safetensors_is_refused(hub, compose):
    files = {"config.json": b"{}", "pytorch_model.bin": b"pickled"}
    Repository("model", "org/old", files).fill_cache(hub)
    with pytest.raises(InputError, match=r"no safetensors weights\. It has pytorch_model\.bin"):
        fetch_model(compose("model.name=org/old").model)


def test_a_dry_run_tells_what_is_on_this_machine(
    hub, model_repository, rows_repository, compose, overrides
):
    model_repository.fill_cache(hub)
    present = [name for name in rows_repository.files if "train-00001" not in name]
    rows_repository.fill_cache(hub, present)
    outlook = foresee(compose(*overrides))
    assert outlook.base.available_offline
    assert not outlook.origin.available_offline
    rows_repository.fill_cache(hub, ["main/train-00001-of-00002.jsonl"])
    outlook = foresee(compose(*overrides))
    assert outlook.origin.available_offline
    assert (outlook.rows, outlook.steps) == (40, 2)


COMMANDS = {
    "dataset=meta_math model=llama": "dataset=meta_math model=llama",
    "-m dataset=sst2,mnli init=lora,pissa seed=0,1": "-m dataset=sst2,mnli seed=0,1",
    "++dataset_name=meta_math +init=gradient ++peft.lora_r=8 ++seed=0": (
        "++dataset_name=meta_math ++seed=0"
    ),
    "dataset.path=a model.name=b model.learning_rate=1 model.max_length=9 wandb.name=x": (
        "dataset.path=a model.name=b model.max_length=9"
    ),
    "train=none init=pissa dataset=gsm8k": "train=none init=pissa dataset=gsm8k",
}


@pytest.mark.parametrize("given", COMMANDS)
def test_the_command_that_prepares_a_run_keeps_what_decides_its_files(given):
    assert prepare_command(given.split()) == f"python scripts/prepare.py {COMMANDS[given]}"


def _call(
    script: str, arguments: list[str], home: Path, **more: str
) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    environment |= {"HF_HOME": str(home)} | more
    environment.pop("HF_HUB_OFFLINE", None) if "HF_HUB_OFFLINE" not in more else None
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
def test_prepared_over_a_network_run_without(
    tmp_path, model_repository, rows_repository, overrides
):
    home, shard = tmp_path / "home", "main/train-00001-of-00002.jsonl"
    offline = {"HF_HUB_OFFLINE": "1"}

    unprepared = _call("run_exp.py", overrides, home, **offline)
    assert unprepared.returncode == 2
    assert (
        "Prepare it where there is a network: python scripts/prepare.py dataset=gsm8k "
        "model.name=org/tiny" in unprepared.stderr
    )
    assert not (tmp_path / "results").exists()

    with HubServer([model_repository, rows_repository], refuse={shard}) as server:
        failed = _call("scripts/prepare.py", overrides, home, HF_ENDPOINT=server.url)
        assert failed.returncode == 2
        assert "the dataset 'openai/gsm8k' could not be fetched" in failed.stderr
        assert "prepared" not in failed.stdout
        server.refuse.clear()
        before = len(server.downloads())

        prepared = _call("scripts/prepare.py", overrides, home, HF_ENDPOINT=server.url)
        assert prepared.returncode == 0, prepared.stderr
        assert "prepared: runs with HF_HUB_OFFLINE=1 find all of it here" in prepared.stdout
        assert rows_repository.commit in prepared.stdout
        assert model_repository.commit in prepared.stdout
        assert shard in {path.partition("/")[2] for path in server.downloads()[before:]}
        fetched = {path.partition("/")[2] for path in server.downloads()}
        assert not fetched & {"pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx"}
        assert sum("model-00001" in path for path in server.downloads()) == 1

    ran = _call("run_exp.py", overrides, home, **offline)
    assert ran.returncode == 0, ran.stderr
    assert "done: accuracy" in ran.stdout

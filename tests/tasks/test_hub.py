"""Splits of hub data sets, read offline from a cache that the test fills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import HubServer, Repository
from huggingface_hub import constants

from lora_one.errors import InputError, NotPreparedError
from lora_one.snapshots import Snapshot
from lora_one.tasks import create_task
from lora_one.tasks.hub import split_names
from lora_one.tasks.rows import hub_cache_holds, read_hub

ROOT = Path(__file__).parents[2]
README = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: socratic/train-*
---
# A data set
"""


def _rows(*questions):
    rows = [{"question": question, "answer": "#### 2"} for question in questions]
    return "\n".join(json.dumps(row) for row in rows).encode()


@pytest.fixture
def repository():
    return Repository(
        "dataset",
        "openai/gsm8k",
        {
            "README.md": README.encode(),
            ".gitattributes": b"",
            "main/train-00000-of-00002.jsonl": _rows("one", "two"),
            "main/train-00001-of-00002.jsonl": _rows("three"),
            "main/test-00000-of-00001.jsonl": _rows("four"),
            "socratic/train-00000-of-00001.jsonl": _rows("five"),
        },
    )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_split_is_read_offline_in_the_order_of_its_shards(hub, repository):
    repository.fill_cache(hub)
    read = read_hub("openai/gsm8k", "main", "train", None)
    assert [row.text("question") for row in read.rows] == ["one", "two", "three"]
    assert read.rows[2].place == "openai/gsm8k train row 2"
    assert read.source["commit"] == repository.commit
    assert read.source["files"] == [f"main/train-0000{i}-of-00002.jsonl" for i in (0, 1)]


def test_a_benchmark_reads_the_hub_offline(hub, repository):
    repository.fill_cache(hub)
    task = create_task("gsm8k", revision=repository.commit)
    assert [example.prompt for example in task.load("test")] == ["Q: four\nA: "]
    assert task.sources["test"]["commit"] == repository.commit


@pytest.mark.parametrize("listing", [True, False], ids=["listed", "without a listing"])
def test_a_missing_shard_is_noticed(hub, repository, listing):
    present = [name for name in repository.files if "train-00001" not in name]
    repository.fill_cache(hub, present, listing=listing)
    assert hub_cache_holds("openai/gsm8k", "main", "test")
    assert not hub_cache_holds("openai/gsm8k", "main", "train")
    with pytest.raises(NotPreparedError, match=r"in part only.*train-00001-of-00002"):
        read_hub("openai/gsm8k", "main", "train", None)


@pytest.mark.parametrize(
    ("readme", "here", "held"),
    [
        ("path: [data/a.jsonl, data/b.jsonl]", ["data/a.jsonl", "data/b.jsonl"], True),
        ("path: [data/a.jsonl, data/b.jsonl]", ["data/a.jsonl"], False),
        ("path: data/*.jsonl", ["data/a.jsonl", "data/b.jsonl"], False),
        (None, ["data/a.jsonl", "data/b.jsonl"], False),
    ],
    ids=["every file is named", "one of them is missing", "a pattern only", "no README"],
)
def test_without_a_listing_what_might_be_a_part_is_not_taken_for_all(hub, readme, here, held):
    header = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    {readme}\n"
    files = {"data/a.jsonl": _rows("one"), "data/b.jsonl": _rows("two")}
    files["README.md"] = f"---\n{header}---\n".encode()
    present = here if readme is None else [*here, "README.md"]
    Repository("dataset", "some/data", files).fill_cache(hub, present, listing=False)
    assert hub_cache_holds("some/data", None, "train", None) == held
    if not held:
        with pytest.raises(NotPreparedError):
            read_hub("some/data", None, "train", None)


@pytest.mark.parametrize("listing", [True, False], ids=["listed", "without a listing"])
@pytest.mark.parametrize("up", [False, True])
def test_a_readme_that_names_a_file_of_this_machine_does_not_have_it_read(
    hub, tmp_path, up, listing
):
    outside = tmp_path / "private.jsonl"
    outside.write_bytes(_rows("private"))
    named = f"{'../' * 30}{outside}".replace("//", "/") if up else str(outside)
    readme = f"---\nconfigs:\n- config_name: default\n  data_files: {named}\n---\n"
    Repository("dataset", "some/data", {"README.md": readme.encode()}).fill_cache(
        hub, listing=listing
    )
    with pytest.raises(InputError, match="has no file for the split"):
        read_hub("some/data", None, "train", None)


def test_a_file_cut_short_is_noticed(hub, repository):
    snapshot = repository.fill_cache(hub)
    assert hub_cache_holds("openai/gsm8k", "main", "test")
    file = (snapshot / "main/test-00000-of-00001.jsonl").resolve()
    file.write_bytes(file.read_bytes()[:-1])
    assert not hub_cache_holds("openai/gsm8k", "main", "test")


def test_an_empty_folder_of_the_cache_holds_nothing(hub, repository):
    repository.fill_cache(hub, only=[])
    assert not hub_cache_holds("openai/gsm8k", "main", "train")
    assert not hub_cache_holds("somebody/else")


def test_another_revision_is_not_taken_instead(hub, repository):
    repository.fill_cache(hub)
    assert not hub_cache_holds("openai/gsm8k", "main", "train", "0" * 40)
    with pytest.raises(NotPreparedError, match=f"at revision {'0' * 40} is not on this machine"):
        read_hub("openai/gsm8k", "main", "train", "0" * 40)


def test_a_wrong_configuration_or_split_names_the_valid_ones(hub, repository):
    repository.fill_cache(hub)
    with pytest.raises(InputError, match=r"no configuration 'mian'.*Did you mean 'main'"):
        read_hub("openai/gsm8k", "mian", "train", None)
    with pytest.raises(InputError, match="no configuration 'default'; it has: main, socratic"):
        read_hub("openai/gsm8k", None, "train", None)
    with pytest.raises(InputError, match="no split 'validation'; it has: train, test"):
        read_hub("openai/gsm8k", "main", "validation", None)


LAYOUTS = [
    # (header of the README, files, config, split, expected)
    (None, ["MetaMathQA-395K.json"], None, "train", ["MetaMathQA-395K.json"]),
    (None, ["test.jsonl", "LICENSE"], None, "test", ["test.jsonl"]),
    (None, ["data/train.csv", "data/dev.csv"], None, "validation", ["data/dev.csv"]),
    (None, ["train/a.jsonl", "test/train.jsonl"], None, "test", ["test/train.jsonl"]),
    (
        None,
        ["sst2/train/0000.parquet", "cola/train/0000.parquet"],
        "cola",
        "train",
        ["cola/train/0000.parquet"],
    ),
    (None, ["rows.json", "dataset_infos.json", ".hidden/rows.json"], None, "train", ["rows.json"]),
    ("data_files: rows.json", ["rows.json", "old.json"], None, "train", ["rows.json"]),
    (
        "data_files: {test: 'b/*.json'}",
        ["a/x.json", "b/x.json", "b/c/y.json"],
        None,
        "test",
        ["b/x.json"],
    ),
    ("data_files: {test: 'b/**'}", ["a/x.json", "b/c/y.json"], None, "test", ["b/c/y.json"]),
    ("data_files: ['[ab].csv']", ["a.csv", "b.csv", "c.csv"], None, "train", ["a.csv", "b.csv"]),
    ("data_files: '*.csv'\n  data_dir: sub", ["a.csv", "sub/b.csv"], None, "train", ["sub/b.csv"]),
]


@pytest.mark.parametrize(("header", "files", "config", "split", "expected"), LAYOUTS)
def test_files_are_found_in_every_layout(tmp_path, header, files, config, split, expected):
    if header:
        text = f"---\nconfigs:\n- config_name: default\n  {header}\n---\n"
        (tmp_path / "README.md").write_text(text)
    sizes = dict.fromkeys(files, 1)
    snapshot = Snapshot("a/b", "dataset", "0" * 40, tmp_path, sizes)
    assert split_names(snapshot, config, split) == expected


MALFORMED = {
    "configs: [a": "while parsing a flow sequence",
    "- a list": "should be a dict",
    "configs: main": "no list of mappings",
    "configs: [main]": "no list of mappings",
    "configs: [{data_files: a.json}]": "no config_name",
    "configs: [{config_name: a, data_files: [{path: a.json}]}]": "data_files of a are no paths",
    "configs: [{config_name: a, data_files: [{split: train}]}]": "data_files of a are no paths",
    "configs: [{config_name: a, data_files: 3}]": "data_files of a are no paths",
    "configs: [{config_name: a, data_files: {train: [1]}}]": "data_files of a are no paths",
}


@pytest.mark.parametrize(("header", "reason"), MALFORMED.items())
def test_a_readme_that_cannot_be_read_is_refused_in_one_line(tmp_path, header, reason):
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n")
    snapshot = Snapshot("a/b", "dataset", "0" * 40, tmp_path, {"a.json": 1})
    with pytest.raises(InputError, match=f"README of the dataset 'a/b' .*{reason}") as error:
        split_names(snapshot, None, "train")
    assert "\n" not in str(error.value)


def test_a_repository_without_the_split_lists_its_files(tmp_path):
    snapshot = Snapshot("a/b", "dataset", "0" * 40, tmp_path, {"train.json": 1, "test.json": 1})
    with pytest.raises(InputError, match=r"no file for the split 'validation'.*test.json, train"):
        split_names(snapshot, None, "validation")


def test_an_unreachable_hub_says_what_to_do(hub, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("name or service not known\nand a stack of details")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(NotPreparedError, match=r"not known\)\. Or pass dataset\.path="):
        create_task("gsm8k").load("test")


FETCH = """
import sys
from lora_one.tasks.rows import read_hub
print(*(row.fields["question"] for row in read_hub("openai/gsm8k", "main", *sys.argv[1:]).rows))
"""


def _fetch(home, server, split="train", revision="main"):
    variables = {"HF_HOME": str(home), "HF_ENDPOINT": server.url, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FETCH, split, revision]
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_only_the_files_of_the_split_are_downloaded_and_only_once(tmp_path, repository):
    with HubServer([repository]) as server:
        assert _fetch(tmp_path, server).stdout == "one two three\n"
        files = {"README.md", *(f"main/train-0000{i}-of-00002.jsonl" for i in (0, 1))}
        assert {path.partition("/")[2] for path in server.downloads()} == files
        before = len(server.downloads())
        assert _fetch(tmp_path, server).stdout == "one two three\n"
        assert len(server.downloads()) == before


def test_a_pinned_split_that_is_here_asks_the_hub_nothing(tmp_path, repository):
    with HubServer([repository]) as server:
        _fetch(tmp_path, server, "train", repository.commit)
        server.requests.clear()
        assert _fetch(tmp_path, server, "train", repository.commit).stdout == "one two three\n"
        assert not server.requests


def test_a_download_that_breaks_off_is_resumed_where_it_broke(tmp_path, repository):
    with HubServer([repository], cut_after={"main/train-00000-of-00002.jsonl": 10}) as server:
        assert _fetch(tmp_path, server).stdout == "one two three\n"
        assert sum("train-00000" in path for path in server.downloads()) == 2


def test_what_the_hub_refuses_is_an_error_and_the_next_try_fetches_the_rest(tmp_path, repository):
    shard = "main/train-00001-of-00002.jsonl"
    with HubServer([repository], refuse={shard}) as server:
        failed = _fetch(tmp_path, server)
        assert failed.returncode != 0
        assert "NotPreparedError: the dataset 'openai/gsm8k' could not be fetched" in failed.stderr
        server.refuse.clear()
        before = len(server.downloads())
        assert _fetch(tmp_path, server).stdout == "one two three\n"
        assert [path.partition("/")[2] for path in server.downloads()[before:]] == [shard]


def test_a_damaged_file_is_fetched_again(tmp_path, repository):
    with HubServer([repository]) as server:
        _fetch(tmp_path, server, "test")
        home = tmp_path / "hub" / "datasets--openai--gsm8k" / "snapshots" / repository.commit
        file = home / "main/test-00000-of-00001.jsonl"
        file.resolve().write_bytes(b"{")
        assert _fetch(tmp_path, server, "test").stdout == "four\n"


def test_a_gated_or_missing_data_set_says_so(tmp_path, repository):
    with HubServer([]) as server:
        assert "the hub has no dataset 'openai/gsm8k'" in _fetch(tmp_path, server).stderr
    repository.gated = True
    with HubServer([repository]) as server:
        assert "is gated: ask for access on" in _fetch(tmp_path, server).stderr

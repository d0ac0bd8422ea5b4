"""Tokenised rows come back as they went in, or not at all."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest

from lora_one.tasks.base import make_example
from lora_one.tasks.encoding import EncodedRows, encode
from lora_one.tasks.reads import recorded_reads
from lora_one.tasks.rows import read_file
from lora_one.tasks.token_cache import (
    Miss,
    TokenisedSplit,
    cache_key,
    entry_file,
    load,
    store,
    text_hashes,
    tokenizer_fingerprint,
)

ROOT = Path(__file__).parents[2]
EXAMPLES = [make_example("train", i, f"Q: {i}?\nA: ", "4" * (i + 1), str(i)) for i in range(12)] + [
    make_example("train", 12, "much too long " * 20, "4", "4")
]
KEY = "f" * 64


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer("<s> $A")


@pytest.fixture
def rows_file(tmp_path):
    file = tmp_path / "rows" / "train.jsonl"
    file.parent.mkdir()
    file.write_text('{"a": "b"}\n')
    return file


@pytest.fixture
def split(tokenizer, rows_file):
    encoded = encode(EXAMPLES, tokenizer, max_length=64, architecture="causal")
    with recorded_reads() as reads:
        read_file(rows_file)
    hashes = [text_hashes(EXAMPLES[:-1], target=target) for target in (False, True)]
    return TokenisedSplit(encoded, *hashes, {"read": 13}, {"file": "train.jsonl"}, list(reads))


def _same(one: EncodedRows, other: EncodedRows) -> bool:
    return list(one.rows) == list(other.rows) and (
        (one.row_ids, one.dropped_row_ids, one.max_length)
        == (other.row_ids, other.dropped_row_ids, other.max_length)
    )


@pytest.mark.parametrize("architecture", ["causal", "seq2seq"])
def test_what_comes_back_is_what_went_in(tmp_path, tokenizer, split, architecture):
    encoded = encode(EXAMPLES, tokenizer, max_length=64, architecture=architecture)
    split = TokenisedSplit(encoded, *([split.prompts[: len(encoded)]] * 2), {}, None, split.reads)
    store(tmp_path / "cache", KEY, split)
    found = load(tmp_path / "cache", KEY)
    assert _same(found.encoded, encoded)
    assert (found.counts, found.source, found.reads) == ({}, None, split.reads)
    assert np.array_equal(found.prompts, split.prompts[: len(encoded)])
    assert found.encoded.tokens == encoded.tokens
    assert found.encoded.supervised_tokens == encoded.supervised_tokens
    assert found.encoded.rows[-1] == encoded.rows[-1]
    assert found.encoded.rows[2:5] == encoded.rows[2:5]
    with pytest.raises(IndexError):
        found.encoded[len(encoded)]


@pytest.mark.parametrize("label", [1, 2.75], ids=["class", "score"])
def test_rows_of_a_classification_head_come_back(tmp_path, split, label):
    row = {"input_ids": [1, 2], "token_type_ids": [0, 1], "labels": [label]}
    encoded = EncodedRows([row, row], ["a", "b"], [], 64)
    split = TokenisedSplit(encoded, split.prompts[:2], split.texts[:2], {}, None, split.reads)
    store(tmp_path / "cache", KEY, split)
    found = load(tmp_path / "cache", KEY).encoded
    assert list(found.rows) == [row, row]
    assert type(found.rows[0]["labels"][0]) is type(label)


def test_nothing_but_the_entry_is_left_behind(tmp_path, split):
    file = store(tmp_path / "cache", KEY, split)
    assert list((tmp_path / "cache").iterdir()) == [file]


def test_an_entry_that_others_may_have_mapped_is_not_replaced(tmp_path, split):
    file = store(tmp_path / "cache", KEY, split)
    inode = file.stat().st_ino
    assert store(tmp_path / "cache", KEY, split) == file
    assert file.stat().st_ino == inode
    assert list((tmp_path / "cache").iterdir()) == [file]
    file.write_bytes(b"")
    store(tmp_path / "cache", KEY, split)
    assert isinstance(load(tmp_path / "cache", KEY), TokenisedSplit)


def test_an_entry_that_is_not_there_is_missed_without_a_word(tmp_path):
    assert load(tmp_path / "cache", KEY) == Miss(None)


def test_an_entry_of_changed_rows_is_not_used(tmp_path, split, rows_file):
    store(tmp_path / "cache", KEY, split)
    rows_file.write_text('{"a": "c"}\n')
    assert "train.jsonl has changed" in load(tmp_path / "cache", KEY).reason
    rows_file.unlink()
    assert "train.jsonl has changed" in load(tmp_path / "cache", KEY).reason


@pytest.mark.parametrize("kept", [0, 7, 100, -1], ids=["empty", "magic", "a part", "all but one"])
def test_a_torn_entry_is_not_used(tmp_path, split, kept):
    file = store(tmp_path / "cache", KEY, split)
    file.write_bytes(file.read_bytes()[:kept])
    assert "cannot be read" in load(tmp_path / "cache", KEY).reason


def test_an_entry_with_a_flipped_bit_is_not_used(tmp_path, split):
    file = store(tmp_path / "cache", KEY, split)
    content = bytearray(file.read_bytes())
    ids = np.array(split.encoded.rows[3]["input_ids"], dtype="<i4").tobytes()
    content[content.index(ids)] ^= 1
    file.write_bytes(content)
    assert "is damaged" in load(tmp_path / "cache", KEY).reason


def test_a_foreign_file_is_not_used(tmp_path, split):
    file = store(tmp_path / "cache", KEY, split)
    file.rename(entry_file(tmp_path / "cache", "e" * 64))
    assert "another configuration" in load(tmp_path / "cache", "e" * 64).reason
    table = pyarrow.table({"a": [1]})
    with pyarrow.ipc.new_file(str(file), table.schema) as writer:
        writer.write_table(table)
    assert "cannot be read" in load(tmp_path / "cache", KEY).reason


def test_the_name_depends_on_all_that_decides_the_rows(tmp_path, make_tokenizer, rows_file):
    tokenizer = make_tokenizer("<s> $A")
    facts = {"dataset": {"name": "gsm8k"}, "max_length": 64}

    def key(tokenizer=tokenizer, folders=(rows_file.parent,), **changed):
        return cache_key(tokenizer, folders, **{**facts, **changed})

    keys = [
        key(),
        key(max_length=65),
        key(dataset={"name": "gsm8k", "seed": 1}),
        key(tokenizer=make_tokenizer("$A </s>")),
        key(tokenizer=make_tokenizer("<s> $A", pad=False)),
        key(folders=()),
    ]
    (rows_file.parent / "validation.jsonl").write_text("")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    (rows_file.parent / "validation.jsonl").unlink()
    (rows_file.parent / "notes.md").write_text("no rows")
    assert key() == keys[0]


def test_a_tokenizer_is_known_by_its_content_not_its_folder(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_llama")
    tokenizer.save_pretrained(tmp_path / "copy")
    copy = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert tokenizer_fingerprint(copy) == tokenizer_fingerprint(tokenizer)
    copy.add_tokens(["<more>"])
    assert tokenizer_fingerprint(copy) != tokenizer_fingerprint(tokenizer)


WRITE = """
import json, sys
from pathlib import Path
from lora_one.tasks.encoding import EncodedRows
from lora_one.tasks.token_cache import TokenisedSplit, load, store, Miss
import numpy as np
rows = [{"input_ids": list(range(50)), "labels": [i] * 50} for i in range(500)]
hashes = np.arange(500, dtype="<u8")
split = TokenisedSplit(
    EncodedRows(rows, [str(i) for i in range(500)], [], 64), hashes, hashes, {}, None, []
)
folder = Path(sys.argv[1])
for _ in range(8):
    store(folder, "f" * 64, split)
    found = load(folder, "f" * 64)
    assert not isinstance(found, Miss), found.reason
    assert list(found.encoded.rows) == rows
"""


def test_processes_that_write_the_same_entry_do_not_disturb_each_other(tmp_path):
    command = [sys.executable, "-c", WRITE, str(tmp_path)]
    started = [
        subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in started:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert len(list(tmp_path.iterdir())) == 1


def test_an_entry_holds_data_only(tmp_path, split):
    """Arrow and JSON: reading an entry cannot run anything."""
    file = store(tmp_path / "cache", KEY, split)
    with pyarrow.memory_map(str(file)) as source:
        schema = pyarrow.ipc.open_file(source).schema
    assert not any(isinstance(t, pyarrow.ExtensionType) for t in schema.types)
    assert json.loads(schema.metadata[b"lora_one"])["key"] == KEY


def test_a_module_of_a_task_that_opens_files_notes_them():
    """What is not noted could change behind an entry of the cache."""
    readers = {"rows.py", "tables.py", "reads.py", "token_cache.py"}
    for file in sorted((ROOT / "lora_one" / "tasks").glob("*.py")):
        source = file.read_text()
        opens = any(word in source for word in ("read_text(", "read_bytes(", "open("))
        if opens and "Popen(" not in source and file.name not in readers:
            assert "note_file(" in source, file.name

"""What was written survives a kill, and only what belongs to the same weights is used."""

import json

import pytest

from lora_one.evaluation.journal import MERGED, Journal, discard, is_part, recover


def _row(name, sample=0, reply="text"):
    return {"row_id": name, "sample": sample, "reply": reply}


@pytest.fixture
def said():
    return []


def _write(folder, rows, rank=0, fingerprint="mine"):
    with Journal(folder, rank, fingerprint) as journal:
        for row in rows:
            journal.add([row])


def test_rows_come_back_from_all_ranks_once_each(tmp_path, said):
    _write(tmp_path, [_row("a"), _row("b", 1, "line\nbreak  ü")])
    _write(tmp_path, [_row("c"), _row("a", reply="another")], rank=1)
    rows = recover(tmp_path, "mine", said.append)
    assert rows == [_row("a"), _row("b", 1, "line\nbreak  ü"), _row("c")]
    assert said == []
    assert [path.name for path in tmp_path.iterdir()] == [MERGED]
    # A second attempt adds to them, and a third finds both.
    _write(tmp_path, [_row("d")], rank=1)
    assert recover(tmp_path, "mine", said.append) == [*rows, _row("d")]


def test_every_row_is_on_disk_before_the_next_is_made(tmp_path):
    with Journal(tmp_path / "made" / "here", 0, "mine") as journal:
        journal.add([_row("a")])
        (part,) = (tmp_path / "made" / "here").iterdir()
        assert json.loads(part.read_text().splitlines()[1]) == _row("a")


def test_a_torn_line_is_dropped_with_a_word(tmp_path, said):
    _write(tmp_path, [_row("a"), _row("b")])
    part = tmp_path / f"{MERGED}-0"
    part.write_text(part.read_text()[:-7])
    assert recover(tmp_path, "mine", said.append) == [_row("a")]
    assert said == [f"note: {MERGED}-0, line 3 is torn; 1 line(s) are made again"]


def test_a_last_line_that_is_whole_but_for_its_end_is_kept(tmp_path, said):
    _write(tmp_path, [_row("a")])
    part = tmp_path / f"{MERGED}-0"
    part.write_text(part.read_text().rstrip("\n"))
    assert recover(tmp_path, "mine", said.append) == [_row("a")]


@pytest.mark.parametrize("text", ["", '{"fingerpr', "\x00\x00"])
def test_a_file_without_a_header_holds_nothing(tmp_path, said, text):
    (tmp_path / f"{MERGED}-0").write_text(text)
    assert recover(tmp_path, "mine", said.append) == []


def test_rows_of_other_weights_are_left_out_with_a_word(tmp_path, said):
    _write(tmp_path, [_row("a")], fingerprint="other")
    _write(tmp_path, [_row("b")], rank=1)
    assert recover(tmp_path, "mine", said.append) == [_row("b")]
    assert "holds 1 replies of other weights or settings" in said[0]
    assert recover(tmp_path, "mine", said.append) == [_row("b")]
    assert len(said) == 1


def test_nothing_is_left_once_the_final_file_is_there(tmp_path, said):
    _write(tmp_path, [_row("a")])
    (tmp_path / "predictions.jsonl").touch()
    discard(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]
    assert not is_part(tmp_path / "predictions.jsonl")
    assert recover(tmp_path, "mine", said.append) == []

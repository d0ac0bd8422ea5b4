import pytest

from lora_one.errors import InputError
from lora_one.tasks import create_task
from lora_one.tasks.reads import reads_the_same, recorded_reads

GOOD = '{"question": "1 + 1?", "answer": "1 + 1 = 2\\n#### 2"}\n'


def _load(folder, text, split="test"):
    (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return create_task("gsm8k", path=folder).load(split)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"test\.jsonl: the file is empty"),
        ("\n  \n", r"test\.jsonl: the file is empty"),
        (GOOD + '{"question": "2?", \n', r"test\.jsonl, line 2: not valid JSON .*column"),
        (GOOD + '\n["a"]\n', r"test\.jsonl, line 3: expected a JSON object, found an array"),
        (GOOD + '{"question": "2?"}\n', r"line 2: a row needs text in 'answer', which is missing"),
        ('{"question": "2?", "answer": null}', r"line 1: .*'answer', which is None"),
        ('{"question": " ", "answer": "#### 1"}', r"line 1: .*'question', which is ' '"),
        ('{"question": "2?", "answer": "two"}', r"line 1: the answer must end in .*#### <number>"),
        ('{"question": "2?", "answer": "#### two"}', r"line 1: the answer must end in"),
        (GOOD + r'{"question": "\ud800"}', r"line 2: a text holds '\\ud800', half of a surrogate"),
        (GOOD + '{"question": 1' + "0" * 5000 + "}", r"test\.jsonl, line 2: a number is too long"),
        (GOOD + "[" * 100_000, r"test\.jsonl, line 2: the JSON is nested too deeply"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, text, said):
    with pytest.raises(InputError, match=said):
        _load(tmp_path, text)


def test_bytes_that_are_not_utf8_are_said(tmp_path):
    (tmp_path / "test.jsonl").write_bytes(b'{"question": "\xff"}')
    with pytest.raises(InputError, match="not UTF-8 text"):
        create_task("gsm8k", path=tmp_path).load("test")


def test_a_missing_split_lists_what_is_there(tmp_path):
    (tmp_path / "train.jsonl").write_text(GOOD)
    with pytest.raises(InputError, match=r"no test\.jsonl or test\.json .* holds: train\.jsonl"):
        create_task("gsm8k", path=tmp_path).load("test")


def test_a_missing_folder_and_a_file_for_a_folder_are_told_apart(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        create_task("gsm8k", path=tmp_path / "nowhere").load("test")
    file = tmp_path / "train.jsonl"
    file.write_text(GOOD)
    with pytest.raises(InputError, match="is a file; expected a folder"):
        create_task("gsm8k", path=file).load("train")


def test_a_bom_carriage_returns_and_line_separators_inside_strings_are_harmless(tmp_path):
    row = '{"question": "one\u2028two?", "answer": "#### 2"}'
    (tmp_path / "test.jsonl").write_bytes(("\ufeff" + row + "\r\n" + row).encode())
    examples = create_task("gsm8k", path=tmp_path).load("test")
    assert [example.prompt for example in examples] == ["Q: one\u2028two?\nA: "] * 2


def test_a_json_array_is_read_and_its_entries_are_numbered(tmp_path):
    (tmp_path / "test.json").write_text(f"[{GOOD.strip()}, 3]")
    with pytest.raises(InputError, match=r"test\.json, entry 1: expected a JSON object, found 3"):
        create_task("gsm8k", path=tmp_path).load("test")
    (tmp_path / "test.json").write_text(f"[{GOOD.strip()}]")
    assert len(create_task("gsm8k", path=tmp_path).load("test")) == 1
    (tmp_path / "test.json").write_text(rf'[{GOOD.strip()}, {{"\udfff": 1}}]')
    with pytest.raises(InputError, match=r"test\.json, entry 1: a text holds '.udfff'"):
        create_task("gsm8k", path=tmp_path).load("test")
    for text, said in (("[" * 100_000, "too deeply"), (f"[{'9' * 5000}]", "number is too long")):
        (tmp_path / "test.json").write_text(text)
        with pytest.raises(InputError, match=rf"test\.json: .*{said}"):
            create_task("gsm8k", path=tmp_path).load("test")
    (tmp_path / "test.json").write_text('{"data": []}')
    with pytest.raises(InputError, match="expected a JSON array of objects, found an object"):
        create_task("gsm8k", path=tmp_path).load("test")


def test_a_json_file_of_one_object_a_line_is_read_as_such(tmp_path):
    (tmp_path / "test.json").write_text(GOOD * 2)
    assert len(create_task("gsm8k", path=tmp_path).load("test")) == 2


def test_both_halves_of_a_surrogate_pair_are_one_character(tmp_path):
    (example,) = _load(tmp_path, r'{"question": "\ud83d\ude00?", "answer": "#### 2"}')
    assert example.prompt == "Q: 😀?\nA: "


def test_what_a_task_read_is_noted_and_a_change_is_noticed(tmp_path):
    (tmp_path / "test.jsonl").write_text(GOOD)
    with recorded_reads() as reads:
        create_task("gsm8k", path=tmp_path).load("test")
    (read,) = reads
    assert read["file"] == str(tmp_path / "test.jsonl")
    assert reads_the_same(read)
    (tmp_path / "test.jsonl").write_text(GOOD * 2)
    assert not reads_the_same(read)
    (tmp_path / "test.jsonl").unlink()
    assert not reads_the_same(read)

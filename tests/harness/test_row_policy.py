"""Rows are left out, refused or announced; none is cut, and no split leaks into another."""

import json

import pytest

from lora_one.errors import InputError
from lora_one.harness.data.splits import take_evenly
from lora_one.harness.plan import make_plan
from lora_one.tasks.base import make_example

LONG = "apples " * 300  # 300 tokens: below model.max_length, beyond the tiny Llama's 256


@pytest.fixture
def rows(copy_of, rows_folder):
    """A copy of the rows' folder, and a way to add rows to a split."""
    folder = copy_of(rows_folder)

    def add(split, *entries):
        file = folder / f"{split}.jsonl"
        file.write_text(file.read_text() + "".join(json.dumps(e) + "\n" for e in entries))

    def first(split):
        return json.loads((folder / f"{split}.jsonl").read_text().splitlines()[0])

    return folder, add, first


def _plan(small, folder, *overrides):
    return make_plan(small(f"dataset.path={folder}", "dataset.train_rows=null", *overrides))


def test_a_validation_row_that_is_a_training_row_is_refused(small, rows):
    folder, add, first = rows
    add("validation", first("train"))
    with pytest.raises(InputError, match=r"1 of 9 validation rows are training rows.*validation/8"):
        _plan(small, folder)


def test_the_same_question_with_another_answer_is_no_copy(small, rows):
    folder, add, first = rows
    add("validation", first("train") | {"answer": "no\n#### 7"})
    assert len(_plan(small, folder).data.validation) == 9


def test_test_prompts_among_the_training_prompts_are_counted_and_said(small, rows, run, capsys):
    folder, add, first = rows
    add("train", first("test") | {"answer": "another way\n#### 7"})
    record = run(small(f"dataset.path={folder}", "dataset.train_rows=null"))
    assert record["data"]["test_prompts_in_train"] == 1
    assert "1 of 6 test prompts are training prompts, word for word" in capsys.readouterr().out
    # The training prompts come from the cache this time.
    assert _plan(small, folder).data.facts["test_prompts_in_train"] == 1


def test_rows_that_are_too_long_are_counted_and_said(small, rows, run, capsys):
    folder, add, _ = rows
    add("train", {"question": LONG, "answer": "#### 1"})
    settings = (f"dataset.path={folder}", "dataset.train_rows=null", "model.max_length=256")
    record = run(small(*settings))
    assert record["data"]["dropped_too_long"] == {"train": 1, "validation": 0}
    assert record["data"]["rows"]["train"] == 48
    said = capsys.readouterr().out
    assert "note: train: 1 of 49 rows left out, longer than model.max_length=256 tokens" in said


def test_every_row_that_is_kept_ends_in_eos(small, rows, tokenizer):
    for encoded in (_plan(small, rows[0]).data.train, _plan(small, rows[0]).data.validation):
        assert {row["labels"][-1] for row in encoded.rows} == {tokenizer.eos_token_id}


def test_a_limit_beyond_the_context_is_refused_where_a_row_needs_it(small, rows):
    folder, add, _ = rows
    assert _plan(small, folder).data.train.max_length == 512  # no row is longer than the 256
    add("train", {"question": LONG, "answer": "#### 1"})
    with pytest.raises(InputError, match=r"reads 256 at most\. Set model\.max_length=256"):
        _plan(small, folder)


def test_t5_has_no_context(small, rows, t5_folder):
    folder, add, _ = rows
    add("train", {"question": LONG, "answer": "#### 1"})
    add("test", {"question": LONG, "answer": "#### 1"})
    plan = _plan(small, folder, f"model.name={t5_folder}")
    assert len(plan.data.train) == 49
    assert plan.data.facts["test_prompts_too_long"] == 0


def test_a_prompt_that_fills_the_context_is_announced_and_not_cut(
    small, rows, run, capsys, tmp_path
):
    folder, add, _ = rows
    add("test", {"question": LONG, "answer": "#### 1"})
    record = run(small(f"dataset.path={folder}"))
    assert record["data"]["test_prompts_too_long"] == 1
    assert "1 of 7 test prompts fill the model's context" in capsys.readouterr().out
    predictions = tmp_path / "results" / record["run_id"] / "predictions.jsonl"
    last = json.loads(predictions.read_text().splitlines()[-1])
    assert (last["reply"], last["scores"]["strict"]["correct"]) == ("", False)


@pytest.fixture
def mmlu(small, tmp_path):
    """Plan an MMLU test with five shots of 30 tokens for the model that reads 256."""

    def from_words(words, *overrides):
        for suffix in ("dev", "test"):
            (tmp_path / "mmlu" / suffix).mkdir(parents=True, exist_ok=True)
            file = tmp_path / "mmlu" / suffix / f"anatomy_{suffix}.csv"
            file.write_text(f"{'apples ' * (30 if suffix == 'dev' else words)},1,2,3,4,A\n" * 5)
        return small(
            "dataset=mmlu", f"dataset.path={tmp_path / 'mmlu'}", "dataset.train_rows=null",
            "dataset.shots=5", "dataset.max_new_tokens=4", "train=none", "init=lora", *overrides
        )  # fmt: skip

    return from_words


def test_shots_give_way_to_the_models_context(mmlu, tokenizer, run, capsys):
    config = mmlu(20)
    for example in (data := make_plan(config).data).test:
        assert 0 < example.prompt.count("Answer: ") < 5
        assert len(tokenizer(example.prompt)["input_ids"]) + 4 <= 256
    assert data.facts["test_prompts_too_long"] == 0
    run(config)
    said = capsys.readouterr().out
    assert "note: test: 5 of 5 prompts shortened to fewer shots" in said
    assert "left out" not in said


def test_an_evaluation_without_room_for_any_reply_is_refused(mmlu):
    with pytest.raises(InputError, match=r"every test prompt \(5 of 5\) fills.* 256 tokens"):
        make_plan(mmlu(300))


def _numbered(sizes):
    """Rows whose parts come one after the other, as files are read."""
    return [
        make_example(part, n, f"{part} {n}", "t", None)
        for part, size in sizes.items()
        for n in range(size)
    ]


def test_a_part_of_the_test_has_as_many_rows_of_every_subject_as_they_go():
    examples = _numbered({"test/a": 5, "test/b": 1, "test/c": 4})
    taken = [e.prompt for e in take_evenly(examples, 6)]
    assert taken == ["test/a 0", "test/a 1", "test/a 2", "test/b 0", "test/c 0", "test/c 1"]
    assert take_evenly(examples, None) == take_evenly(examples, 10) == examples
    # Levels of MATH are no subjects, and the validation splits of MNLI are parts.
    examples = _numbered({"test/a/5": 2, "test/a/3": 2, "test/b/5": 4})
    assert [e.prompt for e in take_evenly(examples, 2)] == ["test/a/5 0", "test/b/5 0"]
    examples = _numbered({"validation_matched": 3, "validation_mismatched": 3})
    assert [e.prompt[-1] for e in take_evenly(examples, 4)] == ["0", "1", "0", "1"]


def test_a_benchmark_in_one_part_gives_its_first_rows(small, rows):
    first = _plan(small, rows[0]).data.test[:4]
    assert _plan(small, rows[0], "dataset.test_rows=4").data.test == first

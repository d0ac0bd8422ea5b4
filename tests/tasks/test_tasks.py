import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_one.errors import InputError
from lora_one.tasks import TASKS, create_task
from lora_one.tasks.arithmetic import EMBEDDED

REPOSITORY = Path(__file__).resolve().parents[2]


def _write_rows(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def small_gsm8k(tmp_path):
    rows = [
        {
            "question": f"What is {n} + 1?",
            "answer": f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}",
        }
        for n in range(40)
    ]
    _write_rows(tmp_path, "train.jsonl", rows)
    _write_rows(tmp_path, "test.jsonl", [{"question": "What is 1 + 99?", "answer": "#### 100"}])
    return tmp_path


def test_prompt_target_and_reference_are_pinned(small_gsm8k):
    task = create_task("gsm8k", path=small_gsm8k, held_out_rows=1)
    assert (task.template.prompt, task.template.target) == ("Q: {question}\nA: ", "{answer}")
    by_prompt = {e.prompt: e for s in ("train", "validation") for e in task.load(s)}
    example = by_prompt["Q: What is 7 + 1?\nA: "]
    assert (example.target, example.reference) == ("7 + 1 = 8\n#### 8", "8")
    assert example.row_id.startswith("train/7-")
    kept = create_task("gsm8k", path=small_gsm8k, held_out_rows=1, strip_calculator=False)
    assert any(e.target == "7 + 1 = <<7+1=8>>8\n#### 8" for e in kept.load("train"))


def test_braces_in_a_question_are_text_and_no_template_field(tmp_path):
    _write_rows(tmp_path, "test.jsonl", [{"question": "{answer} {0}?", "answer": "{x} #### 1"}])
    (example,) = create_task("gsm8k", path=tmp_path).load("test")
    assert (example.prompt, example.target) == ("Q: {answer} {0}?\nA: ", "{x} #### 1")


def test_train_and_validation_partition_the_training_rows(small_gsm8k):
    task = create_task("gsm8k", path=small_gsm8k, held_out_rows=10)
    train, validation = task.load("train"), task.load("validation")
    assert (len(train), len(validation)) == (30, 10)
    assert not {e.prompt for e in train} & {e.prompt for e in validation}
    assert len({e.row_id for e in train + validation}) == 40
    assert task.counts["train"] == {
        "read": 40,
        "kept": 30,
        "in the other of train and validation": 10,
    }


def test_the_validation_slice_depends_on_seed_and_question_and_not_on_order(small_gsm8k):
    def validation(seed=0):
        task = create_task("gsm8k", path=small_gsm8k, held_out_rows=10, split_seed=seed)
        return {e.prompt for e in task.load("validation")}

    first = validation()
    assert validation(1) != first
    lines = (small_gsm8k / "train.jsonl").read_text().splitlines(keepends=True)
    (small_gsm8k / "train.jsonl").write_text("".join(reversed(lines)))
    assert validation() == first


def test_a_question_that_occurs_twice_stays_on_one_side(small_gsm8k):
    text = (small_gsm8k / "train.jsonl").read_text()
    (small_gsm8k / "train.jsonl").write_text(text + text)
    task = create_task("gsm8k", path=small_gsm8k, held_out_rows=10)
    train, validation = task.load("train"), task.load("validation")
    assert (len(train), len(validation)) == (60, 20)
    assert not {e.prompt for e in train} & {e.prompt for e in validation}


def test_a_validation_file_of_the_user_is_taken_as_it_is(small_gsm8k):
    _write_rows(small_gsm8k, "validation.jsonl", [{"question": "3?", "answer": "#### 3"}])
    task = create_task("gsm8k", path=small_gsm8k)
    assert len(task.load("train")) == 40
    assert [e.prompt for e in task.load("validation")] == ["Q: 3?\nA: "]


def test_too_few_rows_to_hold_out_are_an_error(small_gsm8k):
    with pytest.raises(InputError, match=r"500 of 40 .* dataset\.held_out_rows to 1 to 39"):
        create_task("gsm8k", path=small_gsm8k).load("train")


def test_a_row_id_follows_the_content(small_gsm8k):
    before = create_task("gsm8k", path=small_gsm8k).load("test")[0].row_id
    _write_rows(small_gsm8k, "test.jsonl", [{"question": "What is 1 + 98?", "answer": "#### 99"}])
    after = create_task("gsm8k", path=small_gsm8k).load("test")[0].row_id
    assert before.split("-")[0] == after.split("-")[0] == "test/0"
    assert before != after


def test_score_and_summary():
    task = create_task("arithmetic")
    example = task.load("test")[0]
    replies = [example.target, "so 999,999", f"The answer is {example.reference}", "no idea"]
    rows = [{"scores": task.score(reply, example)} for reply in replies]
    assert rows[0]["scores"]["strict"] == {"parsed": example.reference, "correct": True}
    assert rows[3]["scores"]["flexible"] == {"parsed": None, "correct": False}
    assert task.summarise(rows) == {
        "n": 4,
        "accuracy": 0.5,
        "unparsed": 0.5,
        "accuracy_strict": 0.5,
        "unparsed_strict": 0.5,
        "accuracy_flexible": 0.5,
        "unparsed_flexible": 0.25,
        "accuracy_official": 0.25,
        "unparsed_official": 0.75,
    }
    assert task.primary_metric in task.summarise(rows)
    with pytest.raises(InputError, match="no scored row"):
        task.summarise([])


def test_no_answer_is_not_the_answer_zero(tmp_path):
    _write_rows(tmp_path, "test.jsonl", [{"question": "0?", "answer": "#### 0"}])
    task = create_task("gsm8k", path=tmp_path)
    (example,) = task.load("test")
    assert not any(verdict["correct"] for verdict in task.score("nothing", example).values())
    assert all(verdict["correct"] for verdict in task.score("#### 0", example).values())


def test_a_gold_answer_that_the_official_scorer_cannot_read_is_matched_by_no_reply(tmp_path):
    _write_rows(tmp_path, "test.jsonl", [{"question": "?", "answer": "#### -3"}])
    task = create_task("gsm8k", path=tmp_path)
    (example,) = task.load("test")
    for reply in ("", "#### -3", "#### 3"):
        assert not task.score(reply, example)["official"]["correct"]
    assert task.score("#### -3", example)["strict"]["correct"]


def test_the_official_scorer_keeps_its_published_faults(tmp_path):
    _write_rows(tmp_path, "test.jsonl", [{"question": "?", "answer": "#### 1,234"}])
    task = create_task("gsm8k", path=tmp_path)
    (example,) = task.load("test")
    verdicts = task.score("#### 1,999", example)
    assert verdicts["official"] == {"parsed": "1", "correct": True}
    assert verdicts["strict"] == {"parsed": "1999", "correct": False}


def test_every_embedded_answer_scores_as_correct_and_no_question_is_in_two_splits():
    task = create_task("arithmetic")
    assert task.origin().kind == "embedded"
    assert task.origin().location == str(EMBEDDED)
    questions = []
    for split in ("train", "validation", "test"):
        examples = task.load(split)
        rows = [{"scores": task.score(e.target, e)} for e in examples]
        assert task.summarise(rows)["accuracy"] == 1.0
        questions.append({e.prompt for e in examples})
    assert not (questions[0] & questions[1] or questions[0] & questions[2])
    assert not questions[1] & questions[2]


def test_every_real_gold_answer_scores_as_correct(real_gsm8k):
    task = create_task("gsm8k", path=real_gsm8k)
    sizes = {}
    for split in ("train", "validation", "test"):
        examples = task.load(split)
        sizes[split] = len(examples)
        rows = [{"scores": task.score(e.target, e)} for e in examples]
        metrics = task.summarise(rows)
        assert metrics["accuracy_strict"] == metrics["accuracy_flexible"] == 1.0
        assert metrics["unparsed_strict"] == 0.0
        assert not any("<<" in e.target for e in examples)
    assert sizes["train"] + sizes["validation"] == 7473
    assert sizes["validation"] == 500


def test_an_unknown_task_option_and_split_name_the_nearest():
    with pytest.raises(InputError, match=r"unknown dataset 'gsm8'; valid: .*Did you mean 'gsm8k'"):
        create_task("gsm8")
    with pytest.raises(InputError, match=r"dataset\.split_sed .*Did you mean 'split_seed'"):
        create_task("gsm8k", split_sed=1)
    with pytest.raises(InputError, match=r"unknown split 'tests'.*Did you mean 'test'"):
        create_task("arithmetic").load("tests")


def test_every_registered_task_can_be_created_and_located_without_network():
    for name in TASKS.keys() - {"custom"}:  # which has no rows but those it is given
        origin = create_task(name).origin()
        assert origin.kind in ("embedded", "hub")
        assert isinstance(origin.available_offline, bool)


def test_tasks_import_neither_torch_nor_datasets():
    code = (
        "import sys; from lora_one.tasks import create_task; create_task('gsm8k').origin();"
        "create_task('arithmetic').load('test'); print({'torch', 'datasets'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"

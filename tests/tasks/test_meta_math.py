import json

import pytest

from lora_one.errors import InputError
from lora_one.tasks import create_task


def _row(number, kind="GSM_AnsAug", words=3):
    return {
        "type": kind,
        "query": f"What is {number}?",
        "original_question": f"What is {number}?",
        "response": f"{'well ' * words}it is {number}.\n#### {number}\nThe answer is: {number}",
    }


def count_words(texts):
    return [len(text.split()) for text in texts]


@pytest.fixture
def file(tmp_path):
    rows = [_row(n, "MATH_AnsAug" if n % 4 == 3 else "GSM_Rephrased") for n in range(20)]
    rows[5] = _row(5, words=600)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def _numbers(examples):
    return [int(e.reference) for e in examples]


def test_the_published_selection_is_grade_school_rows_below_512_tokens_in_file_order(file):
    task = create_task("meta_math", path=file, train_rows=8, validation_rows=4)
    train = task.load("train", count_tokens=count_words)
    validation = task.load("validation", count_tokens=count_words)
    assert _numbers(train) == [0, 1, 2, 4, 6, 8, 9, 10]
    assert _numbers(validation) == [12, 13, 14, 16]
    assert task.counts["train"] == {
        "read": 20,
        "type without GSM": 5,
        "512 tokens or more": 1,
        "prompt also in train": 0,
        "kept": 8,
    }


def test_prompt_and_target_are_the_published_ones(file):
    task = create_task("meta_math", path=file)
    example = task.load("train", count_tokens=count_words)[0]
    assert example.prompt == "Q: What is 0?\nA: "
    assert example.target == "well well well it is 0.\n#### 0"
    assert example.row_id.startswith("train/0-")


def test_shuffled_is_a_seeded_permutation_and_published_is_not_shuffled(file):
    def order(**options):
        task = create_task("meta_math", path=file, max_tokens=None, **options)
        return _numbers(task.load("train"))

    assert order() == sorted(order())
    assert order(order="shuffled", seed=1) == order(order="shuffled", seed=1)
    assert order(order="shuffled", seed=1) != order(order="shuffled", seed=2)
    assert order(order="shuffled", seed=1) != order()
    assert sorted(order(order="shuffled", seed=1)) == order()


@pytest.mark.parametrize("order", ["published", "shuffled"])
def test_train_and_validation_share_no_row(file, order):
    task = create_task("meta_math", path=file, order=order, max_tokens=None, train_rows=9)
    train, validation = task.load("train"), task.load("validation")
    assert (len(train), len(validation)) == (9, 6)
    assert not {e.row_id for e in train} & {e.row_id for e in validation}


def test_the_test_split_is_gsm8k(file, tmp_path):
    (tmp_path / "test.jsonl").write_text('{"question": "1?", "answer": "<<1=1>>one\\n#### 1"}\n')
    task = create_task("meta_math", path=file, test_path=tmp_path)
    (example,) = task.load("test")
    assert example.target == "one\n#### 1"
    assert task.score("#### 1", example)["strict"]["correct"]
    assert task.origin().available_offline


def test_a_validation_row_with_the_query_of_a_training_row_is_left_out_and_counted(tmp_path):
    rows = [_row(0), _row(1), {**_row(1), "response": "another way\n#### 1"}, _row(2)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    task = create_task("meta_math", path=path, max_tokens=None, train_rows=2, validation_rows=2)
    assert _numbers(task.load("train")) == [0, 1]
    assert _numbers(task.load("validation")) == [2]
    assert task.counts["validation"]["prompt also in train"] == 1


@pytest.fixture
def rewrites(tmp_path):
    """Ten original questions, GSM8K's and MATH's, each rewritten five times."""
    rows = [
        {
            **_row(number, "MATH_AnsAug" if number % 2 else "GSM_AnsAug"),
            "query": f"Rewrite {version} of {number}?",
            "response": f"so\nThe answer is: {number}",
        }
        for version in range(5)
        for number in range(10)
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def test_the_full_set_is_split_by_original_question(rewrites):
    task = create_task(
        "meta_math", path=rewrites, subset="full", train_rows=None, validation_rows=17
    )
    train = task.load("train", count_tokens=count_words)
    validation = task.load("validation", count_tokens=count_words)
    assert (len(train), len(validation)) == (35, 15)  # whole questions: 17 rows at most
    assert not set(_numbers(train)) & set(_numbers(validation))
    assert {number % 2 for number in _numbers(train)} == {0, 1}  # MATH's rows, too
    assert train[0].target.endswith("The answer is: " + train[0].reference)

    def held_out(**options):
        task = create_task(
            "meta_math", path=rewrites, subset="full", max_tokens=None, train_rows=None,
            validation_rows=17, **options,
        )  # fmt: skip
        return set(_numbers(task.load("validation")))

    assert held_out() == held_out(order="shuffled", seed=3) == set(_numbers(validation))
    assert held_out(split_seed=1) != held_out()


def test_the_test_split_can_be_math_with_the_same_prompt(file, tmp_path):
    row = {"problem": "1?", "solution": r"\boxed{1}", "type": "Algebra", "level": "Level 1"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    task = create_task("meta_math", path=file, test_path=tmp_path, test_benchmark="math")
    (example,) = task.load("test")
    assert example.prompt == "Q: 1?\nA: "
    assert task.scorers == ("math_verify", "strict")
    verdicts = task.judge(["The answer is: 1"], [example])
    metrics = task.summarise([{"row_id": example.row_id, "scores": verdicts[0]}])
    assert metrics["accuracy"] == metrics["accuracy_subject_algebra"] == 1
    assert task.score("no", example)["math_verify"] == {"parsed": None, "correct": False}
    assert create_task("meta_math").scorers == ("strict", "flexible", "official")


def test_a_length_limit_needs_a_tokenizer(file):
    with pytest.raises(InputError, match="needs a tokenizer: pass count_tokens"):
        create_task("meta_math", path=file).load("train")


def test_no_row_left_for_training_or_validation_is_an_error(file):
    task = create_task("meta_math", path=file, max_tokens=None)
    assert len(task.load("train")) == 15
    with pytest.raises(InputError, match="training takes 15 rows, which leaves none"):
        task.load("validation")
    with pytest.raises(InputError, match="no row passes the filter"):
        create_task("meta_math", path=file, max_tokens=2).load("train", count_tokens=count_words)


def test_an_unknown_order_and_a_folder_without_the_file_are_errors(tmp_path):
    with pytest.raises(InputError, match="Did you mean 'shuffled'"):
        create_task("meta_math", order="shuffle")
    with pytest.raises(InputError, match="Did you mean 'full'"):
        create_task("meta_math", subset="ful")
    with pytest.raises(InputError, match="valid: gsm8k, math"):
        create_task("meta_math", test_benchmark="mmlu")
    (tmp_path / "other.txt").write_text("")
    with pytest.raises(InputError, match=r"it holds: other\.txt"):
        create_task("meta_math", path=tmp_path, max_tokens=None).load("train")


def test_the_real_sample_keeps_its_four_grade_school_rows(real_meta_math):
    task = create_task("meta_math", path=real_meta_math, max_tokens=None, train_rows=3)
    train, validation = task.load("train"), task.load("validation")
    assert (len(train), len(validation)) == (3, 1)
    assert all("The answer is:" not in e.target and e.target for e in train + validation)
    assert task.counts["train"]["type without GSM"] == 1

"""Commonsense-170K: parts in folders, one schema, labels that are read and never guessed."""

import json
from pathlib import Path

import pytest

from lora_one.errors import InputError
from lora_one.tasks import create_task

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "commonsense"


def write(folder: Path, part: str, split: str, count: int, label: str = "answer") -> None:
    (folder / part).mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "instruction": f"{part} {split} question {number}?\n\nAnswer format: {label}1/{label}2",
            "input": "",
            "output": f"the correct answer is {label}{1 + number % 2}",
            "answer": f"{label}{1 + number % 2}",
        }
        for number in range(count)
    ]
    (folder / part / f"{split}.json").write_text(json.dumps(rows))


@pytest.fixture
def task(tmp_path):
    for part, label in (("piqa", "solution"), ("boolq", "answer")):
        write(tmp_path, part, "train", 20, label)
        write(tmp_path, part, "test", 4, label)
    return create_task("commonsense", path=tmp_path, held_out_rows=6)


def test_the_choices_are_the_replies_with_each_label_that_the_instruction_offers(task):
    example = task.load("test")[0]
    assert example.choices == ("the correct answer is answer1", "the correct answer is answer2")
    assert all(e.target in e.choices for e in task.load("train"))


def test_some_parts_can_be_trained_on_and_others_tested(tmp_path, task):
    def parts(split, **options):
        chosen = create_task("commonsense", path=tmp_path, held_out_rows=6, **options)
        return {e.row_id.split("/")[1] for e in chosen.load(split)}

    assert parts("train", parts=["piqa"]) == parts("test", parts=["piqa"]) == {"piqa"}
    assert parts("test", parts=["piqa"], test_parts=["boolq", "piqa"]) == {"boolq", "piqa"}
    assert parts("train", test_parts=["boolq"]) == {"boolq", "piqa"}
    with pytest.raises(InputError, match=r"no part 'bool'.*Did you mean 'boolq'"):
        create_task("commonsense", parts=["bool"])
    with pytest.raises(InputError, match="expected at least one part"):
        create_task("commonsense", parts=[])
    with pytest.raises(InputError, match=r"no hellaswag/test\.json; there are: boolq, piqa"):
        parts("test", parts=["hellaswag"])


def test_the_file_of_all_training_rows_is_read_and_has_no_parts(tmp_path, task):
    write(tmp_path, "all", "rows", 20)
    file = tmp_path / "all" / "rows.json"
    joined = create_task("commonsense", path=file, test_path=tmp_path, held_out_rows=5)
    assert len(joined.load("train")) == 15
    assert joined.load("train")[0].row_id.startswith("train/all/")
    assert len(joined.load("test")) == 8
    with pytest.raises(InputError, match="do not say their part"):
        create_task("commonsense", path=file, parts=["boolq"]).load("train")


def test_the_parts_are_joined_and_the_splits_share_no_row(task):
    train, validation, test = (task.load(split) for split in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (34, 6, 8)
    assert not {example.prompt for example in train} & {example.prompt for example in validation}
    assert [example.row_id.split("/")[1] for example in test] == ["boolq"] * 4 + ["piqa"] * 4
    assert len({example.row_id for example in train + validation + test}) == 48


def test_the_prompt_is_the_published_template(task):
    example = task.load("test")[0]
    assert example.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nboolq test question 0?\n\n"
        "Answer format: answer1/answer2\n\n### Response:\n"
    )
    assert example.target == "the correct answer is answer1"


REPLIES = {
    "the correct answer is answer1": ("answer1", "answer1"),
    "The correct answer is ANSWER1.": ("answer1", "answer1"),
    "not answer2: the correct answer is answer1": ("answer1", "answer2"),
    "the correct answer is answer2, no, the correct answer is answer1": ("answer1", "answer2"),
    "answer1": (None, "answer1"),
    "the correct answer is": (None, None),
    "I do not know": (None, None),
    "answer12": (None, None),
    "untrue": (None, None),
    "": (None, None),
}


@pytest.mark.parametrize(("reply", "labels"), REPLIES.items())
def test_labels_are_read_from_replies(task, reply, labels):
    verdicts = task.score(reply, task.load("test")[0])
    assert tuple(verdicts[scorer]["parsed"] for scorer in ("strict", "first_label")) == labels
    assert verdicts["strict"]["correct"] == (labels[0] == "answer1")


def test_each_part_has_its_own_accuracy(task):
    examples = task.load("test")
    rows = [
        {
            "row_id": e.row_id,
            "scores": task.score(e.target if "boolq" in e.row_id else "", e)
            | {"choice": {"parsed": e.target, "correct": True}},
        }
        for e in examples
    ]
    metrics = task.summarise(rows)
    assert (metrics["accuracy"], metrics["n"]) == (0.5, 8)
    assert (metrics["accuracy_boolq"], metrics["accuracy_piqa"]) == (1.0, 0.0)
    assert (metrics["accuracy_macro"], metrics["accuracy_choice"]) == (0.5, 1.0)


def test_what_is_missing_is_named(tmp_path, task):
    with pytest.raises(InputError, match=r"dataset\.test_path"):
        create_task("commonsense").load("test")
    with pytest.raises(InputError, match=r"no <part>/train\.json"):
        create_task("commonsense", path=tmp_path / "piqa").load("train")
    (tmp_path / "piqa" / "test.json").write_text(
        '[{"instruction": "x", "output": "y", "answer": "maybe"}]'
    )
    with pytest.raises(InputError, match="is no label: 'maybe'"):
        task.load("test")
    (tmp_path / "piqa" / "test.json").write_text(
        '[{"instruction": "x Answer format: true/false", "output": "answer1", "answer": "answer1"}]'
    )
    with pytest.raises(InputError, match="found labels true, false and output 'answer1'"):
        task.load("test")


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real rows in ../shared/data/commonsense")
def test_every_real_row_answers_itself():
    task = create_task("commonsense", path=REAL)
    for split in ("train", "test"):
        for example in task.load(split):
            assert task.score(example.target, example)["strict"]["correct"], example.row_id

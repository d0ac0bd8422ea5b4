"""A file of the user's: templates over its columns, safe to format, with errors that help."""

import json

import pytest

from lora_one.errors import InputError
from lora_one.tasks import Example, create_task

QUESTION = {"prompt": r"Q: {question}\nA: ", "target": "{answer}"}


def _lines(rows):
    return "\n".join(json.dumps(row) for row in rows)


@pytest.fixture
def file(tmp_path):
    rows = [{"question": f"{n}?", "answer": n, "why": f"because {n}"} for n in range(12)]
    path = tmp_path / "my.jsonl"
    path.write_text(_lines(rows))
    return path


def test_templates_name_columns_and_a_line_end(file):
    task = create_task("custom", path=file, held_out_rows=4, **QUESTION)
    train, validation = task.load("train"), task.load("validation")
    assert (len(train), len(validation)) == (8, 4)
    assert not {e.prompt for e in train} & {e.prompt for e in validation}
    example = next(e for e in train + validation if e.target == "3")
    assert (example.prompt, example.reference) == ("Q: 3?\nA: ", "3")
    assert task.template.prompt == "Q: {question}\nA: "
    assert task.stop_strings == ("\nQ:",)


@pytest.mark.parametrize(("rows", "held_out"), [(2, 1), (19, 1), (117, 11), (6000, 500)])
def test_a_tenth_is_held_out_but_500_rows_at_most(tmp_path, rows, held_out):
    path = tmp_path / "my.jsonl"
    path.write_text(_lines([{"question": f"{n}?", "answer": n} for n in range(rows)]))
    task = create_task("custom", path=path, **QUESTION)
    assert len(task.load("validation")) == held_out
    assert len(task.load("train")) == rows - held_out


def test_rows_that_cannot_be_held_out_are_refused_with_the_options_that_help(file, tmp_path):
    with pytest.raises(
        InputError,
        match=r"hold out 12 of 12 .*dataset\.held_out_rows to 1 to 11, .*dataset\.validation_path=",
    ):
        create_task("custom", path=file, held_out_rows=12, **QUESTION).load("train")
    (tmp_path / "one.jsonl").write_text(_lines([{"question": "1?", "answer": 1}]))
    with pytest.raises(InputError, match=r"1 of 1 training questions for validation: give rows of"):
        create_task("custom", path=tmp_path / "one.jsonl", **QUESTION).load("train")


def test_braces_in_rows_and_doubled_braces_are_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(_lines([{"a": "{b} {a.__class__}", "b": "{{"}] * 2 + [{"a": "x", "b": "y"}]))
    task = create_task(
        "custom", path=path, prompt="{{{a}}}", target="{b}", test_path=path, held_out_rows=1
    )
    example = task.load("test")[0]
    assert (example.prompt, example.target) == ("{{b} {a.__class__}}", "{{")
    assert task.stop_strings == ("\n{",)


@pytest.mark.parametrize(
    "template",
    ["{a.__class__}", "{a[0]}", "{a!r}", "{a:>10}", "{}", "{ }", "{a", "a}", "no column", ""],
)
def test_only_names_of_columns_stand_in_braces(file, template):
    for key in ("prompt", "target"):
        with pytest.raises(InputError, match=rf"dataset\.{key}="):
            create_task("custom", path=file, **(QUESTION | {key: template}))


def test_a_missing_column_is_named_with_the_nearest(file):
    task = create_task("custom", path=file, prompt="{qestion}", target="{answer}")
    with pytest.raises(
        InputError, match=r"line 1: no column 'qestion'; columns.*Did you mean 'question'"
    ):
        task.load("train")
    task = create_task("custom", path=file, reference="anser", **QUESTION)
    with pytest.raises(InputError, match="Did you mean 'answer'"):
        task.load("train")


def test_a_column_that_is_no_text_is_an_error_and_an_empty_target_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(_lines([{"question": "1?", "answer": ["1"]}]))
    with pytest.raises(InputError, match=r"'answer' is \['1'\]"):
        create_task("custom", path=path, test_path=path, **QUESTION).load("test")
    path.write_text(_lines([{"question": "1?", "answer": " "}, {"question": "2?", "answer": 2.5}]))
    task = create_task("custom", path=path, test_path=path, **QUESTION)
    assert [e.target for e in task.load("test")] == ["2.5"]
    assert task.counts["test"] == {"read": 2, "empty target": 1, "kept": 1}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_file_whose_targets_are_all_empty_is_refused_as_such(split, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(_lines([{"question": f"{n}?", "answer": " "} for n in range(3)]))
    task = create_task("custom", path=path, test_path=path, **QUESTION)
    with pytest.raises(InputError, match=r"rows\.jsonl: all 3 rows have an empty target; expected"):
        task.load(split)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    rows = [{"question": "who, me?", "answer": "yes"}, {"question": "2?", "answer": "no"}]
    path = tmp_path / f"test.{suffix}"
    if suffix == "parquet":
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), path)
    else:
        path.write_text({
            "jsonl": _lines(rows),
            "json": json.dumps(rows),
            "csv": 'question,answer\n"who, me?",yes\n2?,no\n',
            "tsv": "question\tanswer\nwho, me?\tyes\n2?\tno\n",
        }[suffix])  # fmt: skip
    examples = create_task("custom", path=tmp_path, **QUESTION).load("test")
    assert [(e.prompt, e.target) for e in examples] == [
        ("Q: who, me?\nA: ", "yes"),
        ("Q: 2?\nA: ", "no"),
    ]


def test_a_folder_or_further_paths_give_the_other_splits(tmp_path, file):
    other = tmp_path / "other.jsonl"
    other.write_text(_lines([{"question": "new?", "answer": 1}]))
    task = create_task("custom", path=file, test_path=other, validation_path=other, **QUESTION)
    assert len(task.load("train")) == 12
    assert len(task.load("validation")) == len(task.load("test")) == 1
    with pytest.raises(InputError, match=r"dataset\.test_path=<file>"):
        create_task("custom", path=file, **QUESTION).load("test")


def test_the_rows_and_templates_must_be_given(file):
    with pytest.raises(InputError, match=r"needs dataset\.prompt and dataset\.target"):
        create_task("custom", path=file)
    for options in ({}, {"path": file, "hub_id": "a/b"}):
        with pytest.raises(InputError, match=r"dataset\.path=<file or folder> or"):
            create_task("custom", **options, **QUESTION)
    with pytest.raises(InputError, match=r"dataset\.stop holds an empty text"):
        create_task("custom", path=file, stop=["x", ""], **QUESTION)
    with pytest.raises(InputError, match="not a regular expression"):
        create_task("custom", path=file, answer_pattern="(", **QUESTION)


def test_the_hub_is_asked_for_the_id_and_configuration(monkeypatch):
    from lora_one.tasks.rows import Row, Rows

    asked = []

    def read_hub(*arguments):
        asked.append(arguments)
        return Rows([Row("here", {"question": "1?", "answer": "1"})], {"hub": arguments[0]})

    monkeypatch.setattr("lora_one.tasks.custom.read_hub", read_hub)
    task = create_task("custom", hub_id="me/mine", hub_config="a", revision="b", **QUESTION)
    assert task.load("test")[0].target == "1"
    assert asked == [("me/mine", "a", "test", "b")]


SCORES = {
    "Paris": (True, True),
    " paris. ": (True, True),
    "It is Paris, surely": (False, True),
    "Parisian": (False, False),
    "": (False, False),
}


@pytest.mark.parametrize(("reply", "verdicts"), SCORES.items())
def test_exact_ignores_case_and_spaces_and_contains_keeps_word_borders(tmp_path, reply, verdicts):
    path = tmp_path / "rows.jsonl"
    path.write_text(_lines([{"question": "Capital of France?", "answer": "Paris"}]))
    task = create_task("custom", path=path, test_path=path, **QUESTION)
    scores = task.score(reply, task.load("test")[0])
    assert (scores["exact"]["correct"], scores["contains"]["correct"]) == verdicts
    assert (scores["exact"]["parsed"] is None) == (reply == "")


@pytest.mark.parametrize(
    ("gold", "held", "not_held"),
    [
        (
            "5",
            ["5.", "it is 5, surely", "$5.00", "10-5", "x=5", "3 + 5", "1. 5", "5%", "well...5"],
            ["1.5", ".5", "-5", "(\N{MINUS SIGN}5)", "1/5", "5/6", "5.05", "5,000", "1,5", "5:30"],
        ),
        ("-5", ["x = -5", "(-5)"], ["10-5", "-5.2"]),
        ("1.5", ["1.5", "1.5 m"], ["11.5", "1.55", "1.5.2"]),
        ("5 apples", ["he has 5 apples."], ["1.5 apples"]),
        ("paris", ["1.Paris", "3/Paris"], []),
    ],
)
def test_contains_compares_whole_numbers(file, gold, held, not_held):
    task = create_task("custom", path=file, **QUESTION)
    example = Example("row", "", gold, gold)
    right = {
        reply for reply in held + not_held if task.score(reply, example)["contains"]["correct"]
    }
    assert right == set(held)


def test_a_pattern_reads_the_answer_and_is_compared_with_the_reference_column(file, tmp_path):
    task = create_task(
        "custom",
        path=file,
        test_path=file,
        prompt="{question}",
        target="{why} #### {answer}",
        reference="answer",
        answer_pattern=r"####\s*(\S+)",
    )
    example = task.load("test")[5]
    assert (example.target, example.reference) == ("because 5 #### 5", "5")
    assert task.scorers == ("pattern", "exact", "contains")
    assert task.score("#### 4 no #### 5", example)["pattern"] == {"parsed": "5", "correct": True}
    assert task.score("5", example)["pattern"] == {"parsed": None, "correct": False}
    rows = [{"row_id": example.row_id, "scores": task.score("5", example)}]
    metrics = task.summarise(rows)
    assert (metrics["accuracy"], metrics["unparsed"], metrics["accuracy_exact"]) == (0, 1, 1)

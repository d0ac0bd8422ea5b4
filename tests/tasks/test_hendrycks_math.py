"""MATH: answers read from LaTeX, compared as mathematics, counted by subject and level."""

import json
import os
import signal
import threading
from dataclasses import replace

import pytest

from lora_one.errors import InputError
from lora_one.tasks import create_task
from lora_one.tasks.base import make_example
from lora_one.tasks.math_answers import (
    last_boxed,
    same_notation,
    same_spelling,
    stated_answer,
)
from lora_one.tasks.math_equivalence import Equivalence

STATED = {
    r"so $\boxed{5}$": "5",
    r"\boxed{1}, no, \boxed{2}": "2",
    r"\boxed{\frac{1}{\sqrt{2}}}.": r"\frac{1}{\sqrt{2}}",
    r"\boxed{\{1, 2\}}": r"\{1, 2\}",
    r"\fbox{7}": "7",
    r"\boxed 5$": "5",
    r"\boxed\frac{1}{2}": r"\frac{1}{2}",
    r"\boxed{x \le \left\{ 3 \right.}": r"x \le \left\{ 3 \right.",
    r"\boxed{8} and an unfinished \boxed{9": "8",
    r"\boxed{ }": None,
    r"an unfinished \boxed{9": None,
    r"\boxedtext{3}": None,
    r"The answer is: \sqrt{5}": r"\sqrt{5}",
    "the answer is $12$.": "12",
    "The final answer is 3.\nNext line 4": "3",
    r"The answer is: 4. \boxed{5}": "5",
    "The answer is:": None,
    "\\boxed{1}\nQ: Another?\nA: \\boxed{2}": "1",
    "5": None,
    "": None,
}


@pytest.mark.parametrize(("reply", "answer"), STATED.items())
def test_the_stated_answer_is_the_last_box_or_else_the_last_statement(reply, answer):
    assert stated_answer(reply) == answer


def test_the_gold_answer_is_the_last_box_of_a_solution():
    assert last_boxed(r"First $\boxed{x}$. Then $\fbox{\text{(C)}}$.") == r"\text{(C)}"


SAME_NOTATION = [
    (r"\frac{1}{2}", r"\dfrac{1}{2}", r"\tfrac12", "1/2", r"\frac{1} {2}", r"$\frac{1}{2}$."),
    ("1234", "1{,}234", r"1\!,234", r"1,\!234", "1234.0", r"1\,234"),
    ("(3,4)", r"\left(3, 4\right)", "( 3,\\ 4 )"),
    ("(1234)", "(1{,}234)"),
    (r"\sqrt{2}", r"\sqrt2"),
    (r"90^\circ", r"90^{\circ}", r"90\degree"),
    (r"90\text{ cm}^2", r"90 \mbox{cm}^2"),
    (r"90\%", "90%"),
    ("0.5", ".5"),
    (r"\text{east}", "east"),
    ("-3", "\N{MINUS SIGN}3"),
    ("2+3i", r"2 + 3\mathrm{i}"),
    ("e^2", r"\mathrm{e}^2"),
    ("3 1", r"3~\ 1", r"3\quad 1"),
    (r"\begin{pmatrix}a\\2\\3\end{pmatrix}", r"\begin{pmatrix} a \\ 2 \\ 3 \end{pmatrix}"),
]
# Forgiven by the strict comparison, and not settled by notation.
SAME_SPELLING = [
    ("1234", "1,234"),
    ("1234567", "1,234,567"),
    ("1234", r"\$1,234"),
    ("1234", "x = 1234"),
    (r"\frac{1}{2}", "x=1/2"),
    ("0.5", "x = .5"),
    ("90", r"90^\circ"),
    ("90", r"90\%"),
    ("90", r"90\text{ degrees}"),
    (r"90^\circ", r"90\text{ degrees}"),
    (r"90\%", r"90\text{ percent}"),
    (r"\$5", r"5\text{ dollars}"),
    ("90", r"90\text{ cm}^2"),
    (r"90\text{ cm}^2", r"90\text{ cm}^{2}"),
    (r"10\text{ p.m.}", r"10\text{ pm}"),
    (r"1\text{ hours}", r"1\text{ hour}"),
]
OTHER_SPELLING = [
    ("12", "21"),
    ("(1,234)", "(1,234,5)"),
    ("(1,234)", "(1234)"),
    ("[1,234]", "[1234]"),
    (r"\{1,234\}", r"\{1234\}"),
    ("1,2", "12"),
    ("1,2,345", "1,2345"),
    ("x+1", "1+x"),
    ("0.5", r"\frac{1}{2}"),
    ("3", "-3"),
    ("3 1/2", "31/2"),
    ("1  2", "12"),
    (r"10\text{ am}", r"10\text{ pm}"),
    (r"5\text{ m}", r"5\text{ km}"),
    (r"5\text{ m}", r"5\text{ m}^2"),
    (r"90^\circ", r"90\%"),
    (r"\$5", r"5\text{ cents}"),
    (r"2+3\mathrm{i}", "2+3"),
    (r"2\text{e}", "2"),
    ("x=5", "y=5"),
]


@pytest.mark.parametrize("group", SAME_NOTATION, ids=lambda group: group[0])
def test_notations_of_one_answer_are_one(group):
    assert all(same_notation(group[0], other) for other in group)
    assert all(same_spelling(other, group[-1]) for other in group)


@pytest.mark.parametrize(("one", "other"), SAME_SPELLING)
def test_what_an_answer_leaves_out_is_forgiven_and_settles_nothing(one, other):
    assert same_spelling(one, other)
    assert same_spelling(other, one)
    assert not same_notation(one, other)


@pytest.mark.parametrize(("one", "other"), OTHER_SPELLING)
def test_other_answers_stay_apart(one, other):
    assert not same_spelling(one, other)
    assert not same_spelling(other, one)
    assert not same_notation(one, other)


EQUAL = [
    (r"\frac{1}{2}", "0.5"),
    ("x+1", "1+x"),
    (r"\sqrt{5}", "5^{1/2}"),
    (r"\frac{3}{4}", r"\frac{6}{8}"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("2x+3y", "3y+2x"),
]
UNEQUAL = [("3", "4"), ("(1,2)", "(2,1)"), ("[0,1)", "[0,1]"), ("3", r"garbage \frac{"), ("5", "")]


@pytest.fixture(scope="module")
def equivalence():
    found = Equivalence(workers=1)
    yield found
    found.close()


def test_answers_are_compared_as_mathematics(equivalence):
    handler = signal.getsignal(signal.SIGALRM)
    assert equivalence.compare(EQUAL) == ["equal"] * len(EQUAL)
    assert equivalence.compare(UNEQUAL) == ["unequal"] * len(UNEQUAL)
    assert signal.getsignal(signal.SIGALRM) is handler


POWER_TOWER = "10^{10^{10^{10}}}"


def test_a_comparison_without_end_is_undecided_and_the_next_one_is_made(equivalence, monkeypatch):
    equivalence.compare([("1", "1")])
    worker = equivalence._all[0]._process.pid
    with monkeypatch.context() as patience:
        patience.setattr("lora_one.tasks.math_equivalence.SECONDS_PER_PAIR", 0.5)
        assert equivalence.compare([("5", POWER_TOWER)]) == ["timeout"]
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    assert equivalence.compare([("2", "1+1"), ("2", "3")]) == ["equal", "unequal"]


def test_a_comparison_that_waits_for_a_busy_machine_is_made(equivalence, monkeypatch):
    equivalence.compare([("1", "1")])
    monkeypatch.setattr("lora_one.tasks.math_equivalence.SECONDS_PER_PAIR", 0.5)
    worker = equivalence._all[0]._process.pid
    os.kill(worker, signal.SIGSTOP)  # others have the processor
    later = threading.Timer(1.5, os.kill, (worker, signal.SIGCONT))
    later.start()
    assert equivalence.compare([("2", "1+1")]) == ["equal"]
    later.join()
    assert equivalence._all[0]._process.pid == worker


def test_a_worker_that_hangs_or_dies_leaves_its_pair_undecided(equivalence, monkeypatch):
    equivalence.compare([("1", "1")])
    os.kill(equivalence._all[0]._process.pid, signal.SIGKILL)
    assert equivalence.compare([("2", "1+1")]) == ["crashed"]
    equivalence.compare([("1", "1")])
    with monkeypatch.context() as patience:
        patience.setattr("lora_one.tasks.math_equivalence._WALL_SECONDS_PER_PAIR", 0.2)
        os.kill(equivalence._all[0]._process.pid, signal.SIGSTOP)
        assert equivalence.compare([("2", "1+1")]) == ["timeout"]
    assert equivalence.compare([("2", "1+1")]) == ["equal"]


def test_modules_in_the_folder_that_the_user_is_in_are_not_run(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('somebody else wrote this')")
    monkeypatch.chdir(tmp_path)
    equivalence = Equivalence(workers=1)
    try:
        assert equivalence.compare([("0.5", r"\frac{1}{2}")]) == ["equal"]
    finally:
        equivalence.close()


def test_ranks_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    for ranks, workers in (("1", 4), ("2", 2), ("8", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert len(Equivalence()._all) == workers


def _row(number, *, level="Level 3", subject="Number Theory", answer=None):
    return {
        "problem": f"What is {number} + {number}?",
        "level": level,
        "type": subject,
        "solution": f"It is $\\boxed{{{2 * number if answer is None else answer}}}$.",
    }


@pytest.fixture
def folder(tmp_path):
    """The original archive: one object per problem, in folders per subject."""
    for split, count in (("train", 12), ("test", 3)):
        for subject in ("Number Theory", "Counting & Probability"):
            home = tmp_path / split / subject.lower().replace(" & ", "_and_").replace(" ", "_")
            home.mkdir(parents=True)
            for number in range(count):
                row = _row(number, subject=subject, level=f"Level {number % 5 + 1}")
                (home / f"{number}.json").write_text(json.dumps(row))
    return tmp_path


def test_the_original_folders_are_read_and_every_row_is_in_one_split(folder):
    task = create_task("math", path=folder, held_out_rows=5)
    splits = {split: task.load(split) for split in ("train", "validation", "test")}
    assert [len(examples) for examples in splits.values()] == [14, 10, 6]  # a question occurs twice
    assert not {e.prompt for e in splits["train"]} & {e.prompt for e in splits["validation"]}
    example = splits["test"][0]
    assert example.prompt == "Q: What is 0 + 0?\nA: "
    assert example.target == "It is $\\boxed{0}$."
    assert example.reference == "0"
    assert example.row_id.startswith("test/counting_and_probability/1/0-")
    assert task.sources["test"]["folder"] == str(folder / "test")


@pytest.mark.parametrize("layout", ["test.jsonl", "test/algebra.json", "test/algebra.jsonl"])
def test_one_file_or_one_file_per_subject_is_read_as_well(tmp_path, layout):
    rows = [_row(1), _row(2)]
    file = tmp_path / layout
    file.parent.mkdir(exist_ok=True)
    lines = "\n".join(json.dumps(row) for row in rows)
    file.write_text(json.dumps(rows) if file.suffix == ".json" else lines)
    assert [e.reference for e in create_task("math", path=tmp_path).load("test")] == ["2", "4"]


def test_the_columns_of_math_500_are_read_and_unknown_levels_are_called_so(tmp_path):
    rows = [
        {"problem": "a", "solution": r"\boxed{1}", "answer": "1", "subject": "Algebra", "level": 2},
        _row(1, level="Level ?"),
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    ids = [e.row_id.rsplit("-")[0] for e in create_task("math", path=tmp_path).load("test")]
    assert ids == ["test/algebra/2/0", "test/number_theory/unknown/1"]


def test_both_scorers_and_the_accuracies_by_subject_and_level(folder):
    task = create_task("math", path=folder)
    examples = task.load("test")
    replies = [f"\\boxed{{{e.reference}}}" for e in examples]
    replies[1] = "The answer is: 1 + 1"  # counting, level 2, gold 2: equal, but spelt otherwise
    replies[2] = "no idea"
    verdicts = task.judge(replies, examples)
    assert verdicts[1] == {
        "math_verify": {"parsed": "1 + 1", "correct": True},
        "strict": {"parsed": "1 + 1", "correct": False},
    }
    rows = [{"row_id": e.row_id, "scores": v} for e, v in zip(examples, verdicts, strict=True)]
    metrics = task.summarise(rows)
    assert metrics["accuracy"] == metrics["accuracy_math_verify"] == pytest.approx(5 / 6)
    assert metrics["accuracy_strict"] == pytest.approx(4 / 6)
    assert metrics["unparsed"] == pytest.approx(1 / 6)
    assert metrics["accuracy_subject_counting_and_probability"] == pytest.approx(2 / 3)
    assert metrics["accuracy_subject_number_theory"] == 1
    assert (metrics["accuracy_level_2"], metrics["accuracy_level_3"]) == (1, 0.5)


def test_undecided_comparisons_are_told_from_wrong_ones_and_counted(folder, monkeypatch):
    task = create_task("math", path=folder)
    examples = task.load("test")[:2]
    monkeypatch.setattr("lora_one.tasks.math_equivalence.SECONDS_PER_PAIR", 0.5)
    verdicts = task.judge([f"\\boxed{{{POWER_TOWER}}}", r"\boxed{77}"], examples)
    assert verdicts[0]["math_verify"] == {
        "parsed": POWER_TOWER,
        "correct": False,
        "compared": "timeout",
    }
    assert verdicts[1]["math_verify"] == {"parsed": "77", "correct": False}
    rows = [{"row_id": e.row_id, "scores": v} for e, v in zip(examples, verdicts, strict=True)]
    metrics = task.summarise(rows)
    assert (metrics["accuracy"], metrics["undecided_timeout"]) == (0, 1)
    assert "undecided_timeout" not in task.summarise(rows[1:])


def test_math500_from_a_folder_is_500_rows_or_an_error(tmp_path):
    file = tmp_path / "test.jsonl"
    for count in (499, 501):
        file.write_text("\n".join(json.dumps(_row(number)) for number in range(count)))
        with pytest.raises(InputError, match=rf"has {count} rows, not 500.*test_set=full"):
            create_task("math", path=tmp_path, test_set="math500").load("test")
    file.write_text("\n".join(json.dumps(_row(number)) for number in range(500)))
    assert len(create_task("math", path=tmp_path, test_set="math500").load("test")) == 500


def test_what_spelling_forgives_is_for_math_verify_to_decide(folder):
    task = create_task("math", path=folder)
    example = task.load("test")[0]
    for gold, reply, correct in (
        ("1234", "1,234", True),
        (r"2+3\mathrm{i}", "2+3i", True),
        ("2+3", r"2+3\mathrm{i}", False),
        ("(1234)", "(1,234)", False),
        ("x=5", "y=5", False),
    ):
        verdict = task.score(f"\\boxed{{{reply}}}", replace(example, reference=gold))
        assert verdict["math_verify"]["correct"] is correct, (gold, reply)


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps(_row(1) | {"solution": "It is 2."}))
    with pytest.raises(InputError, match=r"line 1: the solution must hold.*ends in 'It is 2\.'"):
        create_task("math", path=tmp_path).load("test")
    with pytest.raises(InputError, match="Did you mean 'math500'"):
        create_task("math", test_set="math_500")
    (tmp_path / "train").mkdir()
    with pytest.raises(InputError, match=r"no \.json or \.jsonl file"):
        create_task("math", path=tmp_path).load("train")
    unscored = make_example("test", 0, "p", "t", None)
    with pytest.raises(InputError, match="cannot be scored"):
        create_task("math").score(r"\boxed{1}", unscored)


def test_a_missing_math_verify_is_said_before_anything_is_generated(folder, monkeypatch):
    monkeypatch.setattr("lora_one.tasks.math_equivalence.find_spec", lambda name: None)
    task = create_task("math", path=folder, held_out_rows=2)
    assert task.load("train")
    with pytest.raises(InputError, match=r"pip install 'lora-one\[evaluation\]'"):
        task.load("test")


def test_the_hub_is_asked_for_every_subject_at_the_pinned_commit(monkeypatch):
    asked = []

    def read_hub(hub_id, config, split, revision):
        from lora_one.tasks.rows import Row, Rows

        asked.append((hub_id, config, split, revision))
        return Rows([Row("here", _row(len(asked)))], {"hub": hub_id, "rows": 1})

    monkeypatch.setattr("lora_one.tasks.hendrycks_math.read_hub", read_hub)
    task = create_task("math")
    assert len(task.load("test")) == 7
    assert {(hub, split, revision) for hub, _, split, revision in asked} == {
        ("EleutherAI/hendrycks_math", "test", "21a5633873b6a120296cce3e2df9d5550074f4a3")
    }
    assert [config for _, config, *_ in asked] == [
        "algebra",
        "counting_and_probability",
        "geometry",
        "intermediate_algebra",
        "number_theory",
        "prealgebra",
        "precalculus",
    ]
    assert task.sources["test"]["rows"] == 7
    asked.clear()
    create_task("math", test_set="math500", revision="main").load("test")
    assert asked == [("HuggingFaceH4/MATH-500", None, "test", "main")]

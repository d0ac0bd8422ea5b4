"""MMLU and the instruction sets that are tested on it: formats, letters, shots, and averages."""

import json
from pathlib import Path

import pytest

from lora_one.errors import InputError
from lora_one.tasks import create_task
from lora_one.tasks.encoding import token_counter
from lora_one.tasks.mmlu_subjects import CATEGORIES

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
REAL = SHARED / "mmlu"
needs_mmlu = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/mmlu")


def _write(folder: Path, suffix: str, subject: str, rows: list[str]) -> None:
    (folder / suffix).mkdir(parents=True, exist_ok=True)
    (folder / suffix / f"{subject}_{suffix}.csv").write_text("\n".join(rows) + "\n")


@pytest.fixture
def folder(tmp_path):
    for subject in ("college_physics", "world_religions"):
        _write(tmp_path, "dev", subject, [f"{subject} {n}?,a,b,c,d,{'ABCDA'[n]}" for n in range(5)])
        _write(tmp_path, "val", subject, ["v?,1,2,3,4,D"])
    _write(tmp_path, "test", "college_physics", ['"Who, ""me""?","x, y",2,3,{4},B', "b?,1,2,3,4,C"])
    _write(tmp_path, "test", "world_religions", ["r?,1,2,3,4,A"] * 2)
    return tmp_path


def test_the_prompt_is_that_of_the_authors(folder):
    example = create_task("mmlu", path=folder).load("test")[0]
    assert example.prompt == (
        "The following are multiple choice questions (with answers) about college physics.\n\n"
        'Who, "me"?\nA. x, y\nB. 2\nC. 3\nD. {4}\nAnswer:'
    )
    assert (example.target, example.reference) == (" B", "B")
    assert example.choices == (" A", " B", " C", " D")
    assert example.row_id.startswith("test/college_physics/0-")


def test_shots_are_answered_questions_of_the_same_subject_in_file_order(folder):
    task = create_task("mmlu", path=folder, shots=2, max_prompt_tokens=None)
    assert task.load("test")[2].prompt == (
        "The following are multiple choice questions (with answers) about world religions.\n\n"
        "world_religions 0?\nA. a\nB. b\nC. c\nD. d\nAnswer: A\n\n"
        "world_religions 1?\nA. a\nB. b\nC. c\nD. d\nAnswer: B\n\n"
        "r?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )


def test_a_prompt_over_the_limit_loses_its_last_shots_and_is_counted(folder):
    def count(texts):
        return [len(text) for text in texts]

    full = create_task("mmlu", path=folder, shots=5, max_prompt_tokens=None).load("test")
    # The first question is longer than the second; each of five borders may cost a token.
    limit = len(full[1].prompt) + 5
    task = create_task("mmlu", path=folder, shots=5, max_prompt_tokens=limit)
    examples = task.load("test", count_tokens=count)
    assert [e.prompt.count("Answer: ") for e in examples] == [4, 5, 5, 5]
    assert "college_physics 3?" in examples[0].prompt
    assert "college_physics 4?" not in examples[0].prompt
    assert task.counts["test"] == {"read": 4, "kept": 4, "prompts shortened to fewer shots": 1}
    unlimited = create_task("mmlu", path=folder, shots=5, max_prompt_tokens=1)
    bare = [e.prompt.count("Answer: ") for e in unlimited.load("test", count_tokens=count)]
    assert bare == [0, 0, 0, 0]  # a question is never cut
    with pytest.raises(InputError, match="needs a tokenizer"):
        task.load("test")


def test_every_text_is_tokenised_once_and_no_prompt_is_over_the_limit(folder, make_tokenizer):
    _write(folder, "test", "world_religions", [f"{'r ' * n}?,1,2,3,4,A" for n in range(40)])
    count, tokenised = token_counter(make_tokenizer("<s> $A")), []

    def counted(texts):
        tokenised.extend(texts)
        return count(texts)

    lengths = []
    for limit in (200, 300, 400):
        task = create_task("mmlu", path=folder, shots=5, max_prompt_tokens=limit)
        examples = task.load("test", count_tokens=counted)
        lengths += [
            (n, limit)
            for n, e in zip(count([e.prompt for e in examples]), examples, strict=True)
            if "Answer: " in e.prompt
        ]
        assert len(tokenised) == 1 + 2 * 5 + 42  # the empty text, the shots, the questions
        tokenised.clear()
    assert lengths
    assert all(n <= limit for n, limit in lengths)


def test_a_prompt_leaves_room_in_the_model_whatever_its_own_limit(folder):
    full = create_task("mmlu", path=folder, shots=5, max_prompt_tokens=None).load("test")
    for limit in (None, 10_000):
        task = create_task("mmlu", path=folder, shots=5, max_prompt_tokens=limit)
        task.prompt_room = len(full[1].prompt) + 5
        examples = task.load("test", count_tokens=lambda texts: [len(text) for text in texts])
        assert [e.prompt.count("Answer: ") for e in examples] == [4, 5, 5, 5]


LETTERS = {
    " B": "B",
    "B": "B",
    "(B)": "B",
    "B.": "B",
    "B. 2": "B",
    "**B**": "B",
    "b)": "B",
    "B\nC": "B",
    "The answer is B.": "B",
    "The correct answer is: (D)": "D",
    "A man walks": None,
    "Because": None,
    "E": None,
    "2": None,
    "I think B": None,
    "A or B": None,
    "": None,
}


@pytest.mark.parametrize(("reply", "letter"), LETTERS.items())
def test_a_letter_is_read_where_the_reply_begins_with_one(folder, reply, letter):
    task = create_task("mmlu", path=folder)
    example = task.load("test")[0]
    assert task.score(reply, example) == {"letter": {"parsed": letter, "correct": letter == "B"}}


def _scored(examples, correct):
    return [
        {
            "row_id": example.row_id,
            "scores": {
                name: {"parsed": " A", "correct": right if name == "choice" else False}
                for name in ("choice", "letter")
            },
        }
        for example, right in zip(examples, correct, strict=True)
    ]


def test_accuracy_is_over_questions_and_its_macro_mean_over_subjects(folder):
    _write(folder, "test", "world_religions", ["r?,1,2,3,4,A"] * 3)
    task = create_task("mmlu", path=folder)
    metrics = task.summarise(_scored(task.load("test"), [True, False, True, True, True]))
    assert metrics["accuracy"] == metrics["accuracy_choice"] == pytest.approx(0.8)
    assert metrics["accuracy_macro"] == pytest.approx((0.5 + 1) / 2)
    assert metrics["accuracy_subject_college_physics"] == 0.5
    assert (metrics["accuracy_category_stem"], metrics["accuracy_category_humanities"]) == (0.5, 1)
    assert metrics["accuracy_letter"] == 0


def test_the_hub_schema_is_read_from_a_file(tmp_path):
    row = {"question": "q?", "subject": "sociology", "choices": ["1", "2", "3", "4"], "answer": 3}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    (example,) = create_task("mmlu", path=tmp_path).load("test")
    assert (example.reference, example.target) == ("D", " D")
    assert example.prompt.endswith("q?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:")
    (tmp_path / "test.jsonl").write_text(json.dumps({**row, "answer": 4}))
    with pytest.raises(InputError, match=r"line 1: a row needs four choices.*answer 4"):
        create_task("mmlu", path=tmp_path).load("test")


def test_mmlu_cannot_be_trained_on_and_its_validation_is_its_own(folder):
    task = create_task("mmlu", path=folder)
    with pytest.raises(InputError, match="train=none"):
        task.load("train")
    assert [e.reference for e in task.load("validation")] == ["D", "D"]
    with pytest.raises(InputError, match=r"dataset\.shots=6; expected 0 to 5"):
        create_task("mmlu", shots=6)
    _write(folder, "test", "college_physics", ["q?,1,2,3,4,E"])
    with pytest.raises(InputError, match=r"college_physics_test\.csv.*answer 'E'"):
        task.load("test")


def test_there_are_57_subjects_in_four_categories():
    sizes = [list(CATEGORIES.values()).count(name) for name in sorted(set(CATEGORIES.values()))]
    assert (len(CATEGORIES), sizes) == (57, [13, 14, 12, 18])


@needs_mmlu
def test_every_real_question_is_read_and_its_subject_has_a_category():
    task = create_task("mmlu", path=REAL)
    examples = task.load("test")
    assert len(examples) == 13472
    assert {e.row_id.split("/")[1] for e in examples} == set(CATEGORIES)
    assert len({e.row_id for e in examples}) == len(examples)
    assert all(e.target in e.choices for e in examples)
    assert len(task.load("validation")) == 1531


ROWS = [
    {"instruction": "Add 1 and 1.", "input": "", "output": "2"},
    {"instruction": "Find the verb.", "input": "He runs.", "output": "runs"},
    {"instruction": "Say nothing.", "input": "", "output": ""},
    {"instruction": "Find the verb.", "input": "She walks.", "output": "walks"},
    *({"instruction": f"Count to {n}.", "output": f"1 to {n}"} for n in range(10)),
]


@pytest.fixture
def instructions(tmp_path):
    path = tmp_path / "alpaca_data_cleaned.json"
    path.write_text(json.dumps(ROWS))
    return path


def test_the_prompts_are_alpacas_with_and_without_an_input(instructions, folder):
    task = create_task("alpaca", path=instructions, test_path=folder, held_out_rows=1)
    examples = task.load("train") + task.load("validation")
    prompts = {e.prompt: e.target for e in examples}
    assert prompts[
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd 1 and 1.\n\n### Response:\n"
    ] == "2"  # fmt: skip
    assert prompts[
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nFind the verb.\n\n### Input:\nHe runs.\n\n### Response:\n"
    ] == "runs"  # fmt: skip


def test_alpaca_holds_out_instructions_and_counts_rows_without_output(instructions, folder):
    for seed in range(8):
        task = create_task("alpaca", path=instructions, held_out_rows=4, split_seed=seed)
        train, validation = task.load("train"), task.load("validation")
        sides = [{e.prompt.split("### ")[1] for e in side} for side in (train, validation)]
        assert not sides[0] & sides[1]  # the two sentences with one instruction stay together
        assert len(train) + len(validation) == 13
        assert task.counts["train"]["empty output"] == 1


def test_alpaca_refuses_a_file_without_any_output(instructions):
    instructions.write_text(json.dumps([{**row, "output": " "} for row in ROWS]))
    with pytest.raises(InputError, match=r"alpaca_data_cleaned\.json: all 14 rows have an empty"):
        create_task("alpaca", path=instructions).load("train")


def test_instruction_sets_are_tested_on_mmlu(instructions, folder):
    for name in ("alpaca", "wizard_lm"):
        task = create_task(name, path=instructions, test_path=folder, shots=0)
        examples = task.load("test")
        assert [e.row_id for e in examples] == [
            e.row_id for e in create_task("mmlu", path=folder).load("test")
        ]
        assert task.scorers == ("choice", "letter")
        assert task.score("B", examples[0])["letter"]["correct"]
        assert task.summarise(_scored(examples, [True] * 4))["accuracy_macro"] == 1
        assert task.origin().available_offline


def test_wizard_lm_leaves_out_refusals_and_long_rows_in_file_order(tmp_path):
    rows = [{"instruction": f"i{n}", "output": f"o {n}"} for n in range(8)]
    rows[1]["output"] = "I'm Sorry, no."
    rows[2]["output"] = "As an AI, I cannot."
    rows[3]["output"] = "long " * 1100
    rows[6] = rows[4]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))

    def count(texts):
        return [len(text.split()) for text in texts]

    task = create_task("wizard_lm", path=path, train_rows=3, validation_rows=2)
    assert [e.target for e in task.load("train", count_tokens=count)] == ["o 0", "o 4", "o 5"]
    assert [e.target for e in task.load("validation", count_tokens=count)] == ["o 7"]
    assert task.counts["validation"] == {
        "read": 8,
        "refusal": 2,
        "1024 tokens or more": 1,
        "prompt also in train": 1,
        "kept": 1,
    }
    with pytest.raises(InputError, match="no row is left for validation"):
        create_task("wizard_lm", path=path, max_tokens=None).load("validation")
    with pytest.raises(InputError, match="Did you mean 'original'"):
        create_task("wizard_lm", source="orginal")


@pytest.mark.skipif(not (SHARED / "alpaca").is_dir(), reason="needs ../shared/data/alpaca")
def test_the_real_alpaca_rows_are_read():
    task = create_task("alpaca", path=SHARED / "alpaca" / "random_9k.json", held_out_rows=500)
    train, validation = task.load("train"), task.load("validation")
    assert len(train) + len(validation) + task.counts["train"]["empty output"] == 8229
    assert len(validation) >= 500
    assert any("### Input:" in e.prompt for e in train)

import json
import math

import pytest

from lora_one.errors import InputError, NonFiniteError
from lora_one.evaluation import Reply, Sampling, evaluate_task
from lora_one.evaluation.engines import Decoding, TransformersEngine
from lora_one.evaluation.evaluate import (
    Job,
    answer,
    choice_verdict,
    judge_again,
    plan_jobs,
    row_key,
    summarise,
)
from lora_one.tasks import create_task
from lora_one.tasks.base import Example, Task, Template

TASK = create_task("arithmetic")
GREEDY = Decoding(12, TASK.stop_strings)


def _evaluate(model, tokenizer, examples, architecture="causal", **options):
    return evaluate_task(
        model,
        tokenizer,
        TASK,
        examples,
        architecture=architecture,
        **{"batch_size": 8, "max_new_tokens": 12, **options},
    )


class Parrot:
    """An engine that says what it is told to, two rows at a time."""

    reads_texts = False

    def __init__(self, replies, compared=None):
        self.replies, self.compared, self.asked = replies, compared, []

    def reply(self, examples, keys, decoding, on_replies):
        self.asked.append((keys, decoding))
        for start in range(0, len(examples), 2):
            places = range(start, min(start + 2, len(examples)))
            on_replies(places, [self.replies[place] for place in places])
        return self.replies

    def compare(self, examples):
        self.asked.append([example.row_id for example in examples])
        return [self.compared[example.row_id] for example in examples]


class Colours(Task):
    """A closed set of answers."""

    name = "colours"
    template = Template("{x}", "{y}")
    scorers = ("choice", "exact")

    def load(self, split, *, count_tokens=None):
        raise NotImplementedError

    def origin(self):
        raise NotImplementedError

    def score(self, reply, example):
        return {"exact": {"parsed": reply, "correct": reply == example.target}}


def test_metrics_are_those_of_the_rows(arithmetic_examples):
    examples = arithmetic_examples[:4]
    replies = [
        Reply(examples[0].target, "eos", 20),
        Reply(f"The answer is {examples[1].reference}.", "stop", 6),
        Reply("the answer would be", "length", 64),
        Reply(f"so {examples[3].reference}", "length", 10),
    ]
    rows = answer(Parrot(replies), TASK, plan_jobs(examples), GREEDY)
    metrics = summarise(TASK, rows)
    assert (metrics["n"], metrics["accuracy"], metrics["unparsed"]) == (4, 0.5, 0.5)
    assert (metrics["accuracy_flexible"], metrics["accuracy_official"]) == (0.75, 0.25)
    assert (metrics["truncated"], metrics["reply_tokens"]) == (0.5, 25.0)
    assert TASK.summarise(rows).items() <= metrics.items()


@pytest.mark.parametrize("architecture", ["causal", "seq2seq"])
def test_rows_are_the_predictions_in_order_and_survive_json(
    request, arithmetic_examples, architecture
):
    name = "llama" if architecture == "causal" else "t5"
    model, tokenizer = request.getfixturevalue(name), request.getfixturevalue(f"{name}_tokenizer")
    result = _evaluate(model, tokenizer, arithmetic_examples, architecture)
    assert [row["row_id"] for row in result.rows] == [e.row_id for e in arithmetic_examples]
    assert [row["prompt"] for row in result.rows] == [e.prompt for e in arithmetic_examples]
    assert json.loads(json.dumps(result.rows)) == result.rows
    assert set(result.rows[0]) == {
        "row_id",
        "sample",
        "prompt",
        "reply",
        "reference",
        "scores",
        "stop_reason",
        "tokens",
    }
    assert set(result.rows[0]["scores"]) == set(TASK.scorers)
    assert json.loads(json.dumps(result.metrics)) == result.metrics
    seconds = result.metrics["seconds"]
    assert result.metrics["answers_per_second"] == pytest.approx(24 / seconds)


@pytest.mark.parametrize("architecture", ["causal", "seq2seq"])
def test_rows_are_the_same_at_every_batch_size(request, arithmetic_examples, architecture):
    name = "llama" if architecture == "causal" else "t5"
    model, tokenizer = request.getfixturevalue(name), request.getfixturevalue(f"{name}_tokenizer")
    sampled = {"samples": 2, "sampling": Sampling(0.8, 0.9, seed=1)}
    for options in ({}, sampled):
        one, eight, fitting = (
            _evaluate(model, tokenizer, arithmetic_examples, architecture, batch_size=n, **options)
            for n in (1, 8, "auto")
        )
        assert one.rows == eight.rows == fitting.rows


def test_every_sample_is_a_row_of_its_own(llama, llama_tokenizer, arithmetic_examples):
    sampling = Sampling(1.0, seed=3)
    examples = arithmetic_examples[:3]
    three = _evaluate(llama, llama_tokenizer, examples, samples=3, sampling=sampling)
    assert [row_key(row) for row in three.rows] == [
        (e.row_id, i) for e in examples for i in (0, 1, 2)
    ]
    assert len({row["reply"] for row in three.rows}) > 3
    # A sample does not depend on how many others there are, nor on the other rows.
    two = _evaluate(llama, llama_tokenizer, examples[1:], samples=2, sampling=sampling)
    assert two.rows == [row for row in three.rows[3:] if row["sample"] < 2]


def test_choices_are_compared_once_a_row_and_judged(arithmetic_examples):
    examples = [
        Example("a", "?", "red", "red", ("blue", "red")),
        Example("b", "?", "red", "red", ("blue", "red")),
        Example("c", "?", "red", "red", ("blue", "red")),
    ]
    compared = {"a": [-2.0, -1.0], "b": [-1.0, -2.0], "c": []}
    replies = [Reply("red", "eos", 1)] * 6
    engine = Parrot(replies, compared)
    rows = answer(engine, Colours(), plan_jobs(examples, 2), Decoding(1, samples=2))
    assert [row["scores"]["choice"] for row in rows[::2]] == [
        {"parsed": "red", "correct": True},
        {"parsed": "blue", "correct": False},
        {"parsed": None, "correct": False},
    ]
    assert [row["choice_log_probabilities"] for row in rows[1::2]] == list(compared.values())
    assert engine.asked[1:] == [["a"], ["b"], ["c"]]
    metrics = summarise(Colours(), rows)
    assert (metrics["accuracy"], metrics["accuracy_exact"]) == (pytest.approx(1 / 3), 1.0)
    assert metrics["unparsed_choice"] == pytest.approx(1 / 3)


def test_choices_of_a_real_model_are_the_same_at_every_batch_size(llama, llama_tokenizer, prompts):
    examples = [
        Example(str(index), prompt, "yes", None, ("no", "yes"))
        for index, prompt in enumerate(prompts)
    ]
    one, eight = (
        answer(
            TransformersEngine(llama, llama_tokenizer, "causal", size),
            Colours(),
            plan_jobs(examples),
            Decoding(2),
        )
        for size in (1, 8)
    )
    assert [row["scores"] for row in one] == [row["scores"] for row in eight]
    for first, second in zip(one, eight, strict=True):
        assert all(map(math.isfinite, first["choice_log_probabilities"]))
        # fp32 sums over other paddings
        assert first["choice_log_probabilities"] == pytest.approx(
            second["choice_log_probabilities"], abs=1e-4
        )


def test_the_first_of_equally_probable_choices_is_taken():
    example = Example("a", "?", "b", None, ("a", "b"))
    assert choice_verdict(example, [-1.0, -1.0]) == {"parsed": "a", "correct": False}


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("values", [[NAN, NAN], [-1.0, NAN], [NAN, -1.0], [-INF, -INF], [INF, 0.0]])
def test_probabilities_that_are_no_numbers_are_no_answer(values):
    example = Example("test/7", "?", "a", None, ("a", "b"))
    with pytest.raises(NonFiniteError, match="row test/7: the model gives"):
        choice_verdict(example, values)
    for score in (True, False):
        engine = Parrot([Reply("a", "eos", 1)], {"test/7": values})
        with pytest.raises(NonFiniteError, match="row test/7"):
            answer(engine, Colours(), plan_jobs([example]), Decoding(1), score=score)


def test_an_impossible_choice_is_one(arithmetic_examples):
    assert choice_verdict(Example("r", "?", "b", None, ("a", "b")), [-INF, -1.0])["correct"]


def test_rows_found_again_are_judged_by_the_present_scorers():
    example = Example("a", "?", "red", "the new reference", ("blue", "red"))
    old = {"parsed": "nonsense", "correct": False}
    row = {
        "row_id": "a",
        "sample": 0,
        "reply": "red",
        "reference": "old",
        "scores": {"exact": old, "retired": old},
        "choice_log_probabilities": [-2.0, -1.0],
    }
    right = {"parsed": "red", "correct": True}
    (found,) = judge_again(Colours(), [row], {"a": example})
    assert found["scores"] == {"exact": right, "choice": right}
    assert found["reference"] == "the new reference"
    assert found["reply"] == "red"


def test_generate_only_judges_nothing(arithmetic_examples, monkeypatch):
    monkeypatch.setattr(TASK, "judge", None)
    jobs = plan_jobs(arithmetic_examples[:2])
    rows = answer(Parrot([Reply("x", "eos", 1)] * 2), TASK, jobs, GREEDY, score=False)
    assert [row["scores"] for row in rows] == [{}, {}]
    assert summarise(TASK, rows, score=False) == {"n": 2, "truncated": 0.0, "reply_tokens": 1.0}


def test_rows_are_handed_over_as_they_are_made(arithmetic_examples):
    batches = []
    jobs = plan_jobs(arithmetic_examples[:5])
    rows = answer(Parrot([Reply("x", "eos", 1)] * 5), TASK, jobs, GREEDY, on_rows=batches.append)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert [row for batch in batches for row in batch] == rows


def test_the_tasks_stop_strings_are_used(llama, llama_tokenizer, arithmetic_examples, monkeypatch):
    asked = []

    def reply(_, examples, keys, decoding, on_replies):
        asked.append(decoding)
        on_replies([0], [Reply("", "eos", 1)])

    monkeypatch.setattr(TransformersEngine, "reply", reply)
    _evaluate(llama, llama_tokenizer, arithmetic_examples[:1])
    assert asked == [Decoding(12, ("\nQ:",))]


def test_what_cannot_be_told_apart_or_is_not_there_is_an_error(arithmetic_examples):
    with pytest.raises(InputError, match="no example to evaluate"):
        _evaluate(None, None, [])
    with pytest.raises(InputError, match="same row id"):
        plan_jobs([*arithmetic_examples[:2], arithmetic_examples[0]])
    with pytest.raises(InputError, match="samples=2 greedy replies would be all the same"):
        _evaluate(None, None, arithmetic_examples, samples=2)
    assert plan_jobs(arithmetic_examples[:1], 2)[1] == Job(arithmetic_examples[0], 1)

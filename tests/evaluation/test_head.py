"""A classification head answers as a model that writes would."""

import math

import pytest
import torch
from encoders import POSITIONS, SIZES, bert_tokenizer, roberta_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lora_one.errors import InputError, NonFiniteError
from lora_one.evaluation.context import context_of
from lora_one.evaluation.engines import Decoding
from lora_one.evaluation.evaluate import answer, plan_jobs, summarise
from lora_one.evaluation.head import HeadEngine, head_outputs
from lora_one.evaluation.sampling import Sampling
from lora_one.tasks import create_task
from lora_one.tasks.base import make_example

SENTENCE = "a film that is funny dull long short and never quite what it could have been"
WORDS = SENTENCE.split()
TEXTS = [(" ".join(WORDS[: 2 + n]), " ".join(WORDS[n:])) for n in range(9)]


def _model(kind, tokenizer, labels):
    torch.manual_seed(0)
    sizes = {**SIZES, "initializer_range": 0.5, "vocab_size": len(tokenizer), "num_labels": labels}
    if kind == "bert":
        config = BertConfig(max_position_embeddings=POSITIONS, **sizes)
        return BertForSequenceClassification(config).eval()
    config = RobertaConfig(
        max_position_embeddings=POSITIONS + 2, type_vocab_size=1, pad_token_id=1, **sizes
    )
    return RobertaForSequenceClassification(config).eval()


@pytest.fixture(scope="module", params=["roberta", "bert"])
def case(request):
    make = bert_tokenizer if request.param == "bert" else roberta_tokenizer
    tokenizer = make([SENTENCE])
    return _model(request.param, tokenizer, 3), tokenizer


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_outputs_are_the_models_own_at_every_batch_size(case, batch_size):
    model, tokenizer = case
    found = head_outputs(model, tokenizer, TEXTS, batch_size=batch_size)
    for (first, second), logits in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            own = model(**tokenizer(first, second, return_tensors="pt")).logits[0]
        assert logits == pytest.approx(own.tolist(), abs=1e-5)


def test_a_model_reads_as_many_tokens_as_it_has_positions_for(case):
    """RoBERTa's two extra positions are no token's: one token more would be an index error."""
    model, tokenizer = case
    longest = context_of(model.config, "classification", tokenizer)
    assert longest == POSITIONS
    ids = torch.full((1, longest), 5)
    model(input_ids=ids)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 5))


def _examples(task, choices):
    targets = [task.labels[n % 2] if task.labels else "2.0" for n in range(9)]
    return [
        make_example("test", n, f"prompt {n}", target, target, choices, TEXTS[n])
        for n, target in enumerate(targets)
    ]


def test_the_reply_is_the_word_of_the_most_probable_class(case):
    model, tokenizer = case
    task = create_task("mnli")
    examples = _examples(task, task.labels)
    engine = HeadEngine(model, tokenizer, task, 4)
    rows = answer(engine, task, plan_jobs(examples), Decoding(8))
    outputs = head_outputs(model, tokenizer, TEXTS, batch_size=1)
    for row, logits in zip(rows, outputs, strict=True):
        assert row["reply"] == task.labels[logits.index(max(logits))]
        total = sum(map(math.exp, logits))
        expected = [math.log(math.exp(x) / total) for x in logits]
        assert row["choice_log_probabilities"] == pytest.approx(expected, abs=1e-4)
        assert row["scores"]["exact"] == row["scores"]["choice"]
    metrics = summarise(task, rows)
    assert metrics["accuracy_exact"] == metrics["accuracy_choice"]
    assert (metrics["unparsed"], metrics["truncated"]) == (0, 0)


def test_a_single_output_is_a_score_on_the_scale():
    tokenizer = roberta_tokenizer([SENTENCE])
    model = _model("roberta", tokenizer, 1)
    task = create_task("stsb")
    examples = _examples(task, ())
    model.classifier.out_proj.weight.data *= 20
    rows = answer(HeadEngine(model, tokenizer, task, 4), task, plan_jobs(examples), Decoding(8))
    outputs = head_outputs(model, tokenizer, TEXTS, batch_size=9)
    expected = [min(max(score, 0.0), 5.0) for (score,) in outputs]
    assert {0.0, 5.0} & set(expected)
    assert [float(row["reply"]) for row in rows] == pytest.approx(expected, abs=1e-4)
    assert all(row["scores"]["exact"]["parsed"] is not None for row in rows)
    assert all("choice_log_probabilities" not in row for row in rows)


def test_a_row_too_long_to_be_read_is_unread_and_counted(case):
    model, tokenizer = case
    task = create_task("mnli")
    long = make_example(
        "test", 9, "p", "neutral", "neutral", task.labels, (" ".join(WORDS * 9),) * 2
    )
    examples = [*_examples(task, task.labels), long]
    engine = HeadEngine(model, tokenizer, task, 4)
    rows = answer(engine, task, plan_jobs(examples), Decoding(8))
    assert (rows[-1]["reply"], rows[-1]["stop_reason"]) == ("", "length")
    assert rows[-1]["scores"]["choice"] == {"parsed": None, "correct": False}
    assert summarise(task, rows)["truncated"] == 0.1


def test_what_a_head_cannot_do_is_said(case):
    model, tokenizer = case
    task = create_task("mnli")
    examples = _examples(task, task.labels)
    engine = HeadEngine(model, tokenizer, task, 4)
    with pytest.raises(InputError, match="draws no samples"):
        engine.reply(examples, ["k"] * 9, Decoding(8, (), 2, Sampling(1.0, 1.0, 0)), print)
    gsm8k = [make_example("test", 0, "Q", "A", "1")]
    with pytest.raises(InputError, match="needs a benchmark with labels"):
        engine.reply(gsm8k, ["k"], Decoding(8), print)


@pytest.mark.parametrize("dataset", ["mnli", "stsb"])
def test_outputs_that_are_no_numbers_are_no_reply(dataset):
    """A NaN would be the first class, or a score at an end of the scale."""
    task = create_task(dataset)
    tokenizer = bert_tokenizer([SENTENCE])
    model = _model("bert", tokenizer, len(task.labels) or 1)
    model.classifier.weight.data.fill_(math.nan)
    examples = _examples(task, task.labels)
    engine = HeadEngine(model, tokenizer, task, 4)
    with pytest.raises(NonFiniteError, match=f"row {examples[0].row_id}: the model gives"):
        answer(engine, task, plan_jobs(examples), Decoding(8))

"""Micro-batches that are run as one padded batch: whose rows may be joined, and with what."""

import pytest
import torch
import transformers

import lora_one
from lora_one.gradients.plan import plan
from lora_one.gradients.tokens import checked_batches
from lora_one.layers import plain_layers

from .test_gradients import assert_equal
from .tiny import SIZES, VOCABULARY, batches_for


def test_batches_whose_rows_share_something_are_not_joined(llama):
    positions = torch.arange(12)[None]
    batches = [{**batch, "position_ids": positions} for batch in batches_for(rows=(2, 3))]
    layers = plain_layers(llama, "all-linear")
    assert plan(llama, checked_batches(llama, batches), layers, budget=0).strategy == "groups"
    ours = lora_one.estimate_gradients(llama, batches, strategy="auto", memory_budget=0)
    assert_equal(ours, lora_one.estimate_gradients(llama, batches_for(rows=(2, 3))), 1e-5)


def rows_to_classify(**more):
    ids = [torch.arange(2, 11)[None], torch.arange(2, 14)[None]]
    return [
        {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": torch.tensor([label])}
        | {key: torch.full_like(x, value) for key, value in more.items()}
        for x, label in zip(ids, (0, 1), strict=True)
    ]


@pytest.mark.parametrize("pad", [None, -1, VOCABULARY])
def test_without_a_padding_token_rows_are_joined_unless_a_head_looks_for_it(pad, llama):
    llama.config.pad_token_id = pad
    batches = batches_for(rows=(2,)) + batches_for(rows=(3,), length=9, seed=2)
    held = lora_one.estimate_gradients(llama, batches)
    assert_equal(lora_one.estimate_gradients(llama, batches, strategy="join"), held, 1e-5)
    config = transformers.LlamaConfig(**SIZES)
    classifier, rows = transformers.LlamaForSequenceClassification(config), rows_to_classify()
    config.pad_token_id = pad  # VOCABULARY: added to the tokenizer, but not to the embedding
    held = lora_one.estimate_gradients(classifier, rows)
    auto = lora_one.estimate_gradients(classifier, rows, strategy="auto", memory_budget=0)
    assert_equal(auto, held, 1e-5)


def test_types_of_tokens_are_not_padded_with_the_id_of_a_token():
    config = transformers.RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        type_vocab_size=1,
        pad_token_id=1,
    )
    classifier = transformers.RobertaForSequenceClassification(config)
    rows = rows_to_classify(token_type_ids=0)
    held = lora_one.estimate_gradients(classifier, rows)
    assert_equal(lora_one.estimate_gradients(classifier, rows, strategy="join"), held, 1e-5)


@pytest.mark.parametrize(("masked", "strategy"), [(True, "join"), (False, "groups")])
def test_rows_that_predict_from_their_padding_on_the_left_are_not_joined(masked, strategy, llama):
    batches = batches_for(rows=(2,)) + batches_for(rows=(2,), length=9, seed=2)
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, :2] = 0
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        if masked:  # a prompt, as in training on answers
            batch["labels"][:, 2] = -100
    layers = plain_layers(llama, "all-linear")
    assert plan(llama, checked_batches(llama, batches), layers, budget=0).strategy == strategy

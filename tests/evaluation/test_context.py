"""What a model can read is what it does not fail on, one token more being an error."""

import pytest
import torch
from encoders import POSITIONS, SIZES
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
)

from lora_one.evaluation import choice_log_probabilities, generate_replies
from lora_one.evaluation.context import COUNT_FROM_PADDING, context_of


class Unlimited:
    """A tokenizer that does not know how long a text may be, as many on the hub."""

    model_max_length = int(1e30)


@pytest.mark.parametrize("pad", [1, 3])
@pytest.mark.parametrize(
    "kind", ["bert", "roberta", "camembert", "xlm-roberta", "data2vec-text", "xmod", "ibert"]
)
def test_an_encoder_reads_as_many_tokens_as_it_has_positions_for(kind, pad):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=50, max_position_embeddings=POSITIONS, pad_token_id=pad, **SIZES
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    context = context_of(config, "classification", Unlimited)
    assert context == POSITIONS - (pad + 1 if kind in COUNT_FROM_PADDING else 0)
    more = {"lang_ids": torch.tensor([0])} if kind == "xmod" else {}
    model(torch.full((1, context), 5), **more)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, context + 1), 5), **more)


def test_an_encoder_without_positions_reads_what_its_tokenizer_says():
    class Limited:
        model_max_length = 77

    assert context_of(AutoConfig.for_model("xlnet"), "classification", Limited) == 77


def test_an_encoder_decoder_with_learnt_positions_answers_what_it_can_read(t5_tokenizer):
    """BART's encoder and decoder have positions of their own: the reply takes none from the
    prompt, and a prompt that is too long gets no reply."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(t5_tokenizer),
        max_position_embeddings=16,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    model = BartForConditionalGeneration(config).eval()
    model.final_logits_bias[0, 2] = -100.0  # never ends
    prompts = ["a" * 15, "b" * 16, "c"]
    options = {"architecture": "seq2seq", "batch_size": 3}
    replies = generate_replies(model, t5_tokenizer, prompts, max_new_tokens=40, **options)
    assert [(reply.tokens, reply.stop_reason) for reply in replies] == [
        (16, "length"),
        (0, "length"),
        (16, "length"),
    ]
    choices = [("x", "y"), ("x", "y"), ("x" * 16, "x" * 17)]
    found = choice_log_probabilities(model, t5_tokenizer, prompts, choices, **options)
    assert [len(row) for row in found] == [2, 0, 0]

import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from lora_one.errors import InputError
from lora_one.evaluation import mean_token_loss, token_loss_sum
from lora_one.tasks import Collator, encode


def _batches(examples, tokenizer, architecture, size, model=None):
    encoded = encode(examples, tokenizer, max_length=256, architecture=architecture)
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    collate = Collator(
        tokenizer.pad_token_id, architecture, prepare_decoder_input_ids_from_labels=prepare
    )
    rows = encoded.rows
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def test_the_causal_mean_is_the_models_own_loss_on_one_batch(
    llama, llama_tokenizer, arithmetic_examples
):
    (batch,) = _batches(arithmetic_examples[:6], llama_tokenizer, "causal", 6)
    mean, tokens = mean_token_loss(llama, [batch], "causal")
    with torch.no_grad():
        assert mean == pytest.approx(float(llama(**batch).loss), rel=1e-5)
    assert tokens == int((batch["labels"] != -100).sum())


def test_the_seq2seq_mean_is_the_models_own_loss_on_one_batch(
    t5, t5_tokenizer, arithmetic_examples
):
    (batch,) = _batches(arithmetic_examples[:6], t5_tokenizer, "seq2seq", 6, t5)
    mean, tokens = mean_token_loss(t5, [batch], "seq2seq")
    with torch.no_grad():
        assert mean == pytest.approx(float(t5(**batch).loss), rel=1e-5)
    assert tokens == int((batch["labels"] != -100).sum())


def test_every_token_weighs_the_same_whatever_the_batches(
    llama, llama_tokenizer, arithmetic_examples
):
    rows = sorted(arithmetic_examples, key=lambda example: len(example.target))
    losses = [
        mean_token_loss(llama, _batches(rows, llama_tokenizer, "causal", size), "causal")
        for size in (1, 7, len(rows))
    ]
    assert losses[0].tokens == losses[1].tokens == losses[2].tokens
    assert losses[0].mean == pytest.approx(losses[2].mean, rel=1e-5)
    assert losses[1].mean == pytest.approx(losses[2].mean, rel=1e-5)
    batches = _batches(rows, llama_tokenizer, "causal", 7)
    of_batches = [mean_token_loss(llama, [batch], "causal").mean for batch in batches]
    # The mean of batch means is another number; the tolerance above can tell them apart.
    assert sum(of_batches) / len(of_batches) != pytest.approx(losses[2].mean, rel=1e-4)


def test_the_sum_is_taken_in_fp32_from_half_precision_logits():
    torch.manual_seed(0)
    logits = torch.randn(2, 50, 97).bfloat16()
    labels = torch.randint(0, 97, (2, 50))
    value = token_loss_sum(logits, labels, "seq2seq")
    expected = torch.nn.functional.cross_entropy(
        logits.double().flatten(0, 1), labels.flatten(), reduction="sum"
    )
    assert value.dtype == torch.float32
    # 100 terms in fp32; summed in bf16 the relative error would be about 1e-2.
    assert float(value) == pytest.approx(float(expected), rel=1e-6)


def test_a_causal_position_predicts_the_next_label():
    logits = torch.full((1, 3, 5), -100.0)
    labels = torch.tensor([[4, 1, 3]])
    logits[0, 0, 1] = logits[0, 1, 3] = 100.0
    assert float(token_loss_sum(logits, labels, "causal")) == pytest.approx(0.0)
    assert float(token_loss_sum(logits, labels, "seq2seq")) > 100


def test_nothing_supervised_is_a_zero_with_a_zero_gradient():
    logits = torch.randn(1, 4, 5, requires_grad=True)
    loss = token_loss_sum(logits, torch.full((1, 4), -100), "causal")
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert logits.grad.abs().sum() == 0.0


def test_the_mode_is_restored_and_dropout_is_off(t5, t5_tokenizer, arithmetic_examples):
    batches = _batches(arithmetic_examples[:6], t5_tokenizer, "seq2seq", 3, t5)
    expected = mean_token_loss(t5.eval(), batches, "seq2seq")
    t5.train()
    t5.encoder.eval()
    assert mean_token_loss(t5, batches, "seq2seq") == expected
    assert t5.decoder.training
    assert not t5.encoder.training
    assert "labels" in batches[0]


def test_no_supervised_token_and_no_decoder_inputs_are_errors(
    llama, t5, t5_tokenizer, arithmetic_examples
):
    with pytest.raises(InputError, match="no token is supervised"):
        mean_token_loss(llama, [], "causal")
    batches = _batches(arithmetic_examples[:2], t5_tokenizer, "seq2seq", 2)
    with pytest.raises(InputError, match="needs decoder_input_ids"):
        mean_token_loss(t5, batches, "seq2seq")


@pytest.mark.parametrize("classes", [3, 1])
def test_a_heads_loss_is_transformers_own_times_the_rows(classes):
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        type_vocab_size=1,
        num_labels=classes,
    )
    model = RobertaForSequenceClassification(config).eval()
    labels = torch.tensor([0, 2, 1]) if classes > 1 else torch.tensor([0.5, 4.8, 2.2])
    batch = {"input_ids": torch.randint(3, 20, (3, 6)), "attention_mask": torch.ones(3, 6).long()}
    output = model(**batch, labels=labels)
    loss = token_loss_sum(output.logits, labels, "classification")
    assert float(loss.detach()) == pytest.approx(3 * float(output.loss.detach()), rel=1e-6)
    mean = mean_token_loss(model, [{**batch, "labels": labels}], "classification")
    assert mean == (pytest.approx(float(output.loss.detach()), rel=1e-6), 3)
    # A rank's blank row: it adds nothing to the loss of the others.
    with_blank = torch.cat([labels, labels.new_tensor([-100])])
    logits = torch.cat([output.logits, torch.ones(1, classes)])
    assert torch.equal(token_loss_sum(logits, with_blank, "classification"), loss)

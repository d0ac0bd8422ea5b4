import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lora_one.errors import InputError
from lora_one.evaluation import choice_log_probabilities, token_loss_sum
from lora_one.tasks import Collator, Example, encode

# One letter is one token here. The first row shares nothing, the second its first two letters, in
# the third one choice begins another.
CHOICES = [("y", "n"), ("abc", "abd", "b"), ("in", "inside", "out")]


@pytest.fixture
def gpt2(llama_tokenizer):
    """Learnt absolute positions: wrong position ids would show."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(llama_tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(params=["llama", "gpt2", "t5"])
def case(request):
    name = "t5" if request.param == "t5" else "llama"
    architecture = "seq2seq" if request.param == "t5" else "causal"
    tokenizer = request.getfixturevalue(f"{name}_tokenizer")
    return request.getfixturevalue(request.param), tokenizer, architecture


def _choices_for(prompts):
    return [CHOICES[index % 3] for index in range(len(prompts))]


def _training_loss(model, tokenizer, architecture, prompt, choice, *, with_eos):
    """Sum of the training loss of a one-row batch, as the Trainer would see it."""
    example = Example("test/0", prompt, choice, None)
    encoded = encode([example], tokenizer, max_length=1000, architecture=architecture)
    if not with_eos:
        encoded.rows[0]["labels"][-1] = -100
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    batch = Collator(0, architecture, prepare_decoder_input_ids_from_labels=shift)(encoded.rows)
    labels = batch.pop("labels")
    with torch.no_grad():
        return float(token_loss_sum(model(**batch).logits, labels, architecture))


def test_the_log_probability_of_a_choice_is_minus_its_training_loss(case, prompts):
    model, tokenizer, architecture = case
    choices = _choices_for(prompts)
    found = choice_log_probabilities(
        model, tokenizer, prompts, choices, architecture=architecture, batch_size=5
    )
    for prompt, row, values in zip(prompts, choices, found, strict=True):
        for choice, value in zip(row, values, strict=True):
            loss = _training_loss(
                model, tokenizer, architecture, prompt, choice, with_eos="inside" in row
            )
            assert value == pytest.approx(-loss, abs=1e-4, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_the_batch_size_changes_nothing(case, prompts, batch_size):
    model, tokenizer, architecture = case
    options = {"architecture": architecture, "batch_size": batch_size}
    found = choice_log_probabilities(model, tokenizer, prompts, _choices_for(prompts), **options)
    options["batch_size"] = 4
    expected = choice_log_probabilities(model, tokenizer, prompts, _choices_for(prompts), **options)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-4, rel=1e-5)


def test_choices_that_share_a_stem_share_a_forward_pass(case):
    model, tokenizer, architecture = case
    rows = []
    handle = model.register_forward_pre_hook(
        lambda _, __, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True
    )
    for choices, passes in ((("a", "b", "c"), 1), (("abc", "abd", "b"), 1), (("abc", "xyz"), 2)):
        rows.clear()
        choice_log_probabilities(
            model, tokenizer, ["why"], [choices], architecture=architecture, batch_size=8
        )
        assert sum(rows) == passes
    handle.remove()


def test_a_prompt_that_fills_the_context_has_no_probabilities(llama, llama_tokenizer):
    context = llama.config.max_position_embeddings
    fits, full = "x" * (context - 2), "x" * context
    found = choice_log_probabilities(
        llama,
        llama_tokenizer,
        [fits, full],
        [("a", "b"), ("a", "b")],
        architecture="causal",
        batch_size=2,
    )
    assert len(found[0]) == 2
    assert found[1] == []


def test_the_mode_of_the_model_is_put_back(llama, llama_tokenizer):
    llama.train()
    choice_log_probabilities(
        llama, llama_tokenizer, ["a"], [("b", "c")], architecture="causal", batch_size=1
    )
    assert llama.training


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 0}, "batch_size=0; expected at least 1"),
        ({"architecture": "classification"}, "choices need causal or seq2seq"),
        ({"choices": []}, "1 prompts and 0 lists of choices"),
        ({"choices": [()]}, "a prompt without choices"),
        ({"choices": [("a", "a")]}, "cannot tell the choices"),
    ],
)
def test_a_wrong_argument_is_named(llama, llama_tokenizer, change, said):
    options = {"choices": [("a", "b")], "architecture": "causal", "batch_size": 1} | change
    choices = options.pop("choices")
    with pytest.raises(InputError, match=said):
        choice_log_probabilities(llama, llama_tokenizer, ["why"], choices, **options)


def test_no_prompt_is_no_work():
    assert choice_log_probabilities(None, None, [], [], architecture="causal", batch_size=1) == []

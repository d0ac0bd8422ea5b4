"""Drawn replies: the right distribution, and random numbers that are a reply's own."""

import pytest
import torch

from lora_one.errors import InputError, NonFiniteError
from lora_one.evaluation import Sampling, generate_replies
from lora_one.evaluation.sampling import draw, uniforms

LOGITS = torch.log(torch.tensor([[0.5, 0.125, 0.25, 0.125]]))


def _shares(temperature, top_p, count=4096):
    # The midpoints of equal intervals: the exact distribution, without luck.
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = draw(LOGITS.expand(count, 4), u, temperature, top_p)
    return (torch.bincount(tokens, minlength=4) / count).tolist()


def test_tokens_are_drawn_with_the_models_probabilities():
    assert _shares(1.0, 1.0) == [0.5, 0.125, 0.25, 0.125]
    squared = torch.softmax(2 * LOGITS[0], -1).tolist()
    assert _shares(0.5, 1.0) == pytest.approx(squared, abs=1e-3)


@pytest.mark.parametrize(
    ("top_p", "shares"),
    [(0.4, [1, 0, 0, 0]), (0.5, [1, 0, 0, 0]), (0.6, [2 / 3, 0, 1 / 3, 0]), (1e-9, [1, 0, 0, 0])],
)
def test_top_p_keeps_the_smallest_set_that_has_it_together(top_p, shares):
    assert _shares(1.0, top_p) == pytest.approx(shares, abs=1e-3)


def test_extreme_numbers_draw_a_possible_token():
    ends = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, 4)
    assert draw(logits, ends, 1.0, 1.0).tolist() == [1, 2]
    assert draw(logits, ends, 1.0, 0.9).tolist() == [1, 2]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_what_is_no_distribution_is_not_drawn_from(broken):
    logits = torch.zeros(3, 4)
    logits[1, 2] = broken
    for top_p in (1.0, 0.5):
        with pytest.raises(NonFiniteError, match="row 1 of the batch"):
            draw(logits, torch.zeros(3, dtype=torch.float64), 1.0, top_p)


def test_random_numbers_are_those_of_seed_and_key():
    one = uniforms(Sampling(1.0, seed=1), "a", 20)
    assert uniforms(Sampling(1.0, seed=1), "a", 30)[:20] == one
    others = [uniforms(Sampling(1.0, seed=s), k, 20) for s, k in ((2, "a"), (1, "b"), (11, ""))]
    assert all(other != one for other in others)
    # Known: a change of the generator would make every earlier sampled result another.
    assert one[:2] == pytest.approx([0.5060960, 0.5316848], abs=1e-6)


@pytest.mark.parametrize("architecture", ["causal", "seq2seq"])
def test_a_reply_depends_on_its_key_and_on_nothing_around_it(request, prompts, architecture):
    name = "llama" if architecture == "causal" else "t5"
    model, tokenizer = request.getfixturevalue(name), request.getfixturevalue(f"{name}_tokenizer")
    keys = [str(index) for index in range(len(prompts))]

    def sample(prompts, keys, batch_size, seed=0):
        return generate_replies(
            model,
            tokenizer,
            prompts,
            architecture=architecture,
            batch_size=batch_size,
            max_new_tokens=16,
            sampling=Sampling(20.0, 0.95, seed),
            keys=keys,
        )

    whole = sample(prompts, keys, 64)
    assert whole == sample(prompts, keys, 1) == sample(prompts, keys, 5)
    assert whole[::-1] == sample(prompts[::-1], keys[::-1], 5)
    assert whole[3:6] == sample(prompts[3:6], keys[3:6], 2)
    assert whole != sample(prompts, keys, 64, seed=1)
    assert len({reply.text for reply in sample([prompts[1]] * 6, keys[:6], 6)}) > 1


def test_a_cold_sample_is_the_greedy_reply(llama, llama_tokenizer, prompts):
    options = {"architecture": "causal", "batch_size": 8, "max_new_tokens": 12}
    greedy = generate_replies(llama, llama_tokenizer, prompts, **options)
    cold = generate_replies(
        llama, llama_tokenizer, prompts, sampling=Sampling(1e-4), keys=prompts, **options
    )
    assert cold == greedy


@pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"temperature": -1}, {"top_p": 0}])
def test_what_is_no_distribution_is_an_error(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        Sampling(**{"temperature": 1.0, **bad})

r"""Random replies that do not depend on who else is in the batch.

A token is drawn by inverting the cumulative distribution: with u uniform in [0, 1),

    token = min { t : sum_{s <= t} p_s > u },    p = softmax(logits / temperature)

where ``top_p`` below 1 keeps the smallest set of most probable tokens that together have at least
that probability. The numbers u of a reply come from a generator seeded with (seed, key of the
reply), one for each of its tokens, so batch size, order and rank do not change them. What remains
is rounding: a u that falls within it of a border between two tokens can go either way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import LogitsProcessor

from lora_one.errors import InputError, NonFiniteError


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn.

    Attributes:
        temperature: Divides the logits; above 0.
        top_p: Probability that the tokens in question have together, in (0, 1].
        seed: Seed of all replies.
    """

    temperature: float
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"temperature={self.temperature}; sampling needs one above 0")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}; expected above 0 and at most 1")


def uniforms(sampling: Sampling, key: str, count: int) -> list[float]:
    """Return the first ``count`` random numbers of a reply; more of them begin with the same."""
    # Python seeds a generator with a text by its SHA-512: the same on every machine.
    generator = Random(f"{sampling.seed}\x1f{key}")
    return [generator.random() for _ in range(count)]


def sampler(sampling: Sampling, keys: Sequence[str], max_new_tokens: int) -> LogitsProcessor:
    """Make what turns greedy decoding of a batch into sampling, one key a row."""
    return _Sampler(sampling, [uniforms(sampling, key, max_new_tokens) for key in keys])


class _Sampler(LogitsProcessor):
    """Leaves one token possible in each row, so that the greedy choice is the drawn one."""

    def __init__(self, sampling: Sampling, numbers: list[list[float]]) -> None:
        self._sampling = sampling
        self._numbers = torch.tensor(numbers, dtype=torch.float64)
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        u = self._numbers[:, self._step].to(scores.device)
        self._step += 1
        chosen = draw(scores, u, self._sampling.temperature, self._sampling.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def draw(logits: Tensor, u: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw one token a row by inversion.

    Args:
        logits: (rows, vocabulary).
        u: (rows,), float64 in [0, 1).
        temperature: Above 0.
        top_p: In (0, 1].

    Returns:
        Token ids, (rows,), int64.

    Raises:
        NonFiniteError: A row of logits has NaN or +inf, or nothing but -inf.
    """
    # fp64: an fp32 sum over a vocabulary of 100,000 is off by more than its rare tokens weigh.
    p = torch.softmax(logits.double() / temperature, dim=-1)
    if (broken := p.isnan().any(dim=-1)).any():
        row = int(broken.nonzero()[0])
        raise NonFiniteError(f"row {row} of the batch: its logits are no distribution (NaN)")
    if top_p < 1:
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        # A token stays as long as those before it have less than top_p: the first always does.
        dropped = ordered.cumsum(dim=-1) - ordered >= top_p
        p = p.masked_fill(dropped.scatter(1, order, dropped), 0.0)
    cumulative = p.cumsum(dim=-1)
    # The total is 1 up to rounding, or below it after top_p.
    threshold = u[:, None] * cumulative[:, -1:]
    return (cumulative > threshold).int().argmax(dim=-1)

"""How to see every layer's complete gradient without holding all of them.

With one micro-batch nothing has to wait: each layer's gradient is complete when the backward pass
leaves the layer, is handed over and dropped (``"stream"``). With several micro-batches there are
three ways, and ``plan`` takes the first that applies:

``hold``    one sweep; all fp32 sums wait for the last micro-batch. For models whose sums fit the
            budget this is the fastest: no padding, no recomputation.
``join``    all rows in one padded batch under activation checkpointing, then as with one. Costs
            one more forward pass, holds one layer's activations and one gradient, whatever the
            depth. Needs train mode (where transformers checkpoints) and batches that can be
            padded.
``groups``  as many sweeps as there are groups of layers whose sums fit the budget.

A gradient that is complete at once need not be formed either: it is a sum of outer products over
tokens, and on a CPU a wide layer's decomposition multiplies with the tokens' vectors for less work
than forming G takes (``lora_one.numerics.outer_products``).

Products ``G X`` accumulated over passes (a randomised SVD without G for several micro-batches) were
left out: they need a forward and backward pass per Krylov block, 4 to 6 of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_one.errors import InputError, nearest
from lora_one.gradients.restore import can_checkpoint
from lora_one.gradients.tokens import IGNORED, Batch, supervised_tokens
from lora_one.layers import TargetLayer

BUDGET = 256 * 2**20
"""Bytes of gradients that may wait by default: all of a 60 M model, four layers of a 7 B one."""
STRATEGIES = ("auto", "hold", "join", "groups")

_PADDING = {
    "labels": IGNORED,
    "attention_mask": 0,
    "decoder_attention_mask": 0,
    "token_type_ids": 0,
}
_TOKEN_KEYS = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True)
class Plan:
    """What to run: micro-batches with their token counts, groups of layers, checkpointing."""

    strategy: str
    batches: list[tuple[Batch, int]]
    groups: list[Sequence[TargetLayer]]
    checkpointing: bool = False


def plan(
    model: nn.Module,
    counted: list[tuple[Batch, int]],
    layers: Sequence[TargetLayer],
    *,
    strategy: str = "auto",
    budget: int | None = None,
    train: bool = True,
    several: bool | None = None,
    everywhere: Callable[[bool], bool] = bool,
) -> Plan:
    """Choose among the ways above.

    Args:
        model: as it will be run.
        counted: micro-batches with their numbers of supervised tokens.
        layers: of interest.
        strategy: one of ``STRATEGIES``.
        budget: bytes of gradients that may wait for later micro-batches; None for ``BUDGET``.
        train: whether the model will be in train mode.
        several: whether any rank has more than one micro-batch; None looks at this one's.
        everywhere: tells whether something holds on all ranks, whose batches may differ: they
            hand layers over in step, so all take the same way.

    Raises:
        InputError: for an unknown strategy, or ``join`` where it is impossible.
    """
    if strategy not in STRATEGIES:
        raise InputError(
            f"unknown strategy '{strategy}'.{nearest(strategy, STRATEGIES)} "
            f"Strategies: {', '.join(STRATEGIES)}."
        )
    several = len(counted) > 1 if several is None else several
    budget = BUDGET if budget is None else budget
    if not several:
        return Plan("stream", counted, [layers])
    size = sum(4 * layer.shape[0] * layer.shape[1] for layer in layers)
    if strategy == "hold" or (strategy == "auto" and size <= budget):
        return Plan("hold", counted, [layers])
    if strategy in ("auto", "join") and train and can_checkpoint(model):
        joined = joined_batch([batch for batch, _ in counted], _base(model))
        if everywhere(joined is not None):
            tokens = supervised_tokens(model, joined)
            return Plan("join", [(joined, tokens)], [layers], checkpointing=True)
    if strategy == "join":
        raise InputError(
            "these batches cannot be joined: that needs train=True, a transformers model, and "
            "batches (of every rank) of equal lengths or with input_ids, attention_mask and labels "
            "only."
        )
    groups = in_groups(layers, budget, lambda layer: 4 * layer.shape[0] * layer.shape[1])
    return Plan("groups", counted, groups)


def joined_batch(batches: Sequence[Batch], model: nn.Module) -> dict[str, Any] | None:
    """Return all rows as one batch, padded on the right, or None where that is not safe."""
    if any(set(batch) != set(batches[0]) for batch in batches):
        return None
    for batch in batches:
        if len({len(value) for value in batch.values() if _has_rows(value)}) > 1:
            return None  # something is shared by the rows, such as position_ids (1, T)
    padding = _padding_id(model)
    if padding is None and type(model).__name__.endswith("ForSequenceClassification"):
        return None  # its head reads the last token that is no padding
    joined = {}
    for key in batches[0]:
        values = [batch[key] for batch in batches]
        if not all(map(_has_rows, values)):
            return None
        if len({value.shape[1:] for value in values}) == 1:
            joined[key] = torch.cat(values)
            continue
        known = key in _PADDING or key in _TOKEN_KEYS
        masked = "attention_mask" in batches[0] and not any(map(_predicts_from_padding, batches))
        if not (known and masked and all(value.ndim == 2 for value in values)):
            return None
        fill = _PADDING.get(key, padding or 0)
        length = max(value.shape[1] for value in values)
        pad = torch.nn.functional.pad
        joined[key] = torch.cat(
            [pad(value, (0, length - value.shape[1]), value=fill) for value in values]
        )
    return joined


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim >= 1


def _predicts_from_padding(batch: Batch) -> bool:
    """Whether a row padded on the left supervises its first token.

    Such a token is predicted from a position that attends to nothing, or to all in equal parts: the
    loss then depends on how long the padding is.
    """
    mask, labels = batch["attention_mask"], batch["labels"]
    if mask.ndim != 2 or mask.shape != labels.shape:
        return False
    return bool(((labels[:, 1:] != IGNORED) & (mask[:, :-1] == 0)).any())


def _padding_id(model: nn.Module) -> int | None:
    """Return the id that the model pads with, None where it has none (Llama-2) or one outside.

    Early Llama checkpoints have -1, and a pad token may have been added without its embedding.
    """
    text = model.config.get_text_config()
    own = getattr(text, "pad_token_id", None)
    return own if own is not None and 0 <= own < getattr(text, "vocab_size", 0) else None


def in_groups(
    layers: Sequence[TargetLayer], budget: int, bytes_of: Callable[[TargetLayer], int]
) -> list[Sequence[TargetLayer]]:
    """Cut the layers, in their order, into groups that fit the budget; one alone may exceed it."""
    groups: list[list[TargetLayer]] = [[]]
    size = 0
    for layer in layers:
        needed = bytes_of(layer)
        if groups[-1] and size + needed > budget:
            groups.append([])
            size = 0
        groups[-1].append(layer)
        size += needed
    return groups


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model

"""Which tokens a batch supervises: the weights with which micro-batches enter the mean."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_one.errors import InputError

IGNORED = -100
_UNSHIFTED = (
    "ForMaskedLM",
    "ForPreTraining",
    "ForTokenClassification",
    "ForSequenceClassification",
    "CpmAntForCausalLM",
    "XLNetLMHeadModel",
    "WithLMHeadModel",  # XLM and Flaubert
)

Batch = Mapping[str, Any]


def supervised_tokens(model: nn.Module, batch: Batch) -> int:
    """Return how many tokens the model's own loss is the mean of.

    Labels of -100 never count. A causal model predicts position t from those before it, so the
    first column counts for nothing; encoder-decoders, masked models, classifiers and a few language
    models (XLNet, XLM) shift nothing.
    """
    if "shift_labels" in batch:
        return int((batch["shift_labels"] != IGNORED).sum())
    labels = batch["labels"]
    if labels.ndim == 2 and _shifts_labels(model):
        labels = labels[:, 1:]
    return int((labels != IGNORED).sum())


def checked_batches(model: nn.Module, batches: Iterable[Batch]) -> list[tuple[Batch, int]]:
    """Return the batches that supervise something, each with its number of supervised tokens.

    Raises:
        InputError: if there is no batch, a batch without labels, or no supervised token at all.
    """
    counted = []
    total = 0
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise InputError(
                f"batch {index} is a {type(batch).__name__}; expected a mapping of keyword "
                "arguments for the model, such as input_ids, attention_mask and labels."
            )
        if batch.get("labels") is None:
            raise InputError(
                f"batch {index} has no labels (keys: {', '.join(batch)}); the gradient is that "
                "of the training loss, so every batch needs them."
            )
        if not isinstance(batch["labels"], Tensor):
            raise InputError(
                f"the labels of batch {index} are a {type(batch['labels']).__name__}; expected a "
                "tensor."
            )
        tokens = supervised_tokens(model, batch)
        total += 1
        if tokens:
            # What Trainer passes for its own accumulation: the loss would not be this batch's mean.
            own = {k: v for k, v in batch.items() if k != "num_items_in_batch"}
            counted.append((own, tokens))
    if not total:
        raise InputError("no batches were given; the gradient needs at least one.")
    if not counted:
        raise InputError(
            f"none of the {total} batches supervises a token: all labels are {IGNORED}. Check "
            "the truncation length and the masking of prompts."
        )
    return counted


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Return the batch with its tensors on the device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _shifts_labels(model: nn.Module) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return False
    return not type(base).__name__.endswith(_UNSHIFTED)

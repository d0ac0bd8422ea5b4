"""Batched generation that gives the replies of one-prompt-at-a-time decoding, faster.

``model.generate`` decodes; here prompts are sorted, padded, bounded and cut. "Greedy" is
unconditional: no sampling setting, penalty or minimum length that a checkpoint carries in its
``generation_config`` has an effect; only its end-of-sequence ids are read. With a ``Sampling``
every reply has random numbers of its own (``lora_one.evaluation.sampling``).

A reply is a function of the token sequence alone (the tokens up to the first end-of-sequence id,
at most ``max_new_tokens``), so batch size and order cannot change it, as long as the arithmetic
finds the same largest logit. In fp32 batching moves logits by about 1e-6 relative, in bf16 by
about 1e-2: there, near ties can fall the other way.

A batch whose longest prompt leaves less of the context than a shorter one needs is decoded as far
as the longest may go; rows that have not ended are then decoded again without it, so that no
position beyond the context is ever asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList

from lora_one.errors import InputError
from lora_one.evaluation.batching import AUTO, Batches, BatchSize
from lora_one.evaluation.context import context_of, room_for_reply
from lora_one.evaluation.finite import RequireNumbers
from lora_one.evaluation.mode import evaluation_mode, input_device
from lora_one.evaluation.sampling import Sampling, sampler
from lora_one.evaluation.stops import Stops
from lora_one.tasks.encoding import Architecture, encode_prompts, padding_id

StopReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Reply:
    """A generated reply.

    Attributes:
        text: The reply without special tokens, cut where a stop string begins.
        stop_reason: ``eos``, ``stop`` (a stop string) or ``length`` (``max_new_tokens`` reached,
            or the model's context full).
        tokens: Tokens generated up to and including the one that ended the reply.
    """

    text: str
    stop_reason: StopReason
    tokens: int


OnReplies = Callable[[Sequence[int], Sequence[Reply]], None]
"""Takes the positions of the prompts that were just answered, and their replies."""


def generate_replies(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    architecture: Architecture,
    batch_size: BatchSize,
    max_new_tokens: int,
    stop_strings: Sequence[str] = (),
    sampling: Sampling | None = None,
    keys: Sequence[str] | None = None,
    on_replies: OnReplies | None = None,
) -> list[Reply]:
    """Decode in batches sorted by prompt length, and return replies in prompt order.

    Args:
        model: A causal or seq2seq language model, or a ``PeftModel`` of one. Its modes are put
            back afterwards.
        tokenizer: Its tokenizer; padding side and pad token do not matter.
        prompts: The texts, tokenised exactly as ``encode`` tokenises them for training.
        architecture: ``causal`` or ``seq2seq``.
        batch_size: Rows decoded together, at most; ``auto``: as many as fit
            (``lora_one.evaluation.batching``).
        max_new_tokens: Limit for each reply. The model's context is a limit as well, which a
            causal model's prompt and reply share; a prompt that leaves no room for a reply gets an
            empty one with stop reason ``length``.
        stop_strings: A reply ends where the first of these begins.
        sampling: None decodes greedily.
        keys: What each reply's random numbers are seeded with; needed with ``sampling``. They
            also name the replies in error messages.
        on_replies: Called after every batch.

    Raises:
        InputError: ``batch_size`` or ``max_new_tokens`` below 1, an unknown architecture, or
            sampling without a key for every prompt.
        NonFiniteError: The model's logits are NaN.
    """
    _check(architecture, batch_size, max_new_tokens)
    if sampling is not None and len(keys or ()) != len(prompts):
        raise InputError(f"sampling needs one key a prompt: {len(prompts)} prompts, keys={keys}")
    if not prompts:
        return []
    prompt_ids = encode_prompts(prompts, tokenizer, architecture=architecture)
    context = context_of(model.config, architecture, tokenizer)
    limits = [room_for_reply(context, len(ids), architecture, max_new_tokens) for ids in prompt_ids]
    eos, pad = eos_token_ids(model, tokenizer), padding_id(tokenizer)
    stops = Stops(tokenizer, stop_strings, partial(_decode, tokenizer))
    replies: dict[int, Reply] = {}

    def keep(batch: Sequence[int], generated: Sequence[list[int]]) -> None:
        made = [make_reply(tokenizer, ids, eos, stop_strings) for ids in generated]
        replies.update(zip(batch, made, strict=True))
        if on_replies is not None:
            on_replies(batch, made)

    def decode(batch: Sequence[int]) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        left = list(batch)
        while left:
            # What the longest prompt leaves room for; those that may say more have shorter ones.
            width = max(len(prompt_ids[index]) for index in left)
            longest = max(limits[index] for index in left)
            limit = room_for_reply(context, width, architecture, longest)
            found.update(zip(left, decode_once(left, limit), strict=True))
            left = [i for i in left if limits[i] > limit and not ended(found[i])]
        return [found[index] for index in batch]

    def ended(ids: list[int]) -> bool:
        return make_reply(tokenizer, ids, eos, stop_strings).stop_reason != "length"

    def named(batch: Sequence[int]) -> tuple[list[str], list[int]]:
        names = [f"prompt {i}" if keys is None else f"reply {keys[i]}" for i in batch]
        return names, [limits[index] for index in batch]

    def decode_once(batch: Sequence[int], limit: int) -> list[list[int]]:
        inputs = _pad([prompt_ids[index] for index in batch], pad, architecture)
        processors = LogitsProcessorList([RequireNumbers(*named(batch), [*eos, pad])])
        if sampling is not None:
            processors.append(sampler(sampling, [keys[index] for index in batch], limit))
        # A causal model repeats the prompt, an encoder-decoder the start token.
        skipped = inputs["input_ids"].shape[1] if architecture == "causal" else 1
        output = model.generate(
            **{name: tensor.to(input_device(model)) for name, tensor in inputs.items()},
            max_new_tokens=limit,
            logits_processor=processors,
            stopping_criteria=stops.criteria(skipped),
            # On a sharded model transformers would keep ranks together by itself, which takes the
            # same number of batches on each; whoever shards it keeps them together.
            synced_gpus=False,
        )
        rows = zip(batch, output[:, skipped:].tolist(), strict=True)
        return [_up_to_eos(row, eos)[: limits[index]] for index, row in rows]

    full = [index for index, limit in enumerate(limits) if limit == 0]
    if full:
        keep(full, [[] for _ in full])
    todo = [index for index, limit in enumerate(limits) if limit > 0]
    # Longest first: a batch size that does not fit fails at once instead of at the end.
    todo.sort(key=lambda index: -len(prompt_ids[index]))
    lengths = [len(prompt_ids[index]) + limits[index] for index in todo]
    with evaluation_mode(model), _plain_greedy(model, eos, pad):
        for batch, generated in Batches(model, batch_size).run(todo, lengths, decode):
            keep(batch, generated)
    return [replies[index] for index in range(len(prompts))]


def _check(architecture: str, batch_size: BatchSize, max_new_tokens: int) -> None:
    if architecture not in get_args(Architecture):
        valid = ", ".join(get_args(Architecture))
        raise InputError(f"architecture='{architecture}'; valid: {valid}")
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value != AUTO and value < 1:
            raise InputError(f"{name}={value}; expected at least 1")


@contextmanager
def _plain_greedy(model: nn.Module, eos: frozenset[int], pad: int) -> Iterator[None]:
    """Let ``generate`` decode greedily, whatever the checkpoint says; put its settings back."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    original = base.generation_config
    base.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        eos_token_id=sorted(eos),
        pad_token_id=pad,
        bos_token_id=original.bos_token_id,
        decoder_start_token_id=_decoder_start_token_id(base, original),
    )
    try:
        yield
    finally:
        base.generation_config = original


def _pad(rows: list[list[int]], pad: int, architecture: Architecture) -> dict[str, Tensor]:
    """Pad on the left for a causal model, whose reply begins at the end, else on the right."""
    width = max(len(ids) for ids in rows)
    ids, mask = [], []
    for row in rows:
        filler, gap = [pad] * (width - len(row)), [0] * (width - len(row))
        left = architecture == "causal"
        ids.append(filler + row if left else row + filler)
        mask.append(gap + [1] * len(row) if left else [1] * len(row) + gap)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _up_to_eos(ids: list[int], eos: frozenset[int]) -> list[int]:
    """Cut the padding that fills a row after its end-of-sequence id, which is kept."""
    end = next((place for place, token in enumerate(ids) if token in eos), len(ids))
    return ids[: end + 1]


def make_reply(
    tokenizer: Any, ids: list[int], eos: frozenset[int], stop_strings: Sequence[str]
) -> Reply:
    """Turn a token sequence into a reply; depends on nothing but the sequence."""
    ended = bool(ids) and ids[-1] in eos
    content = ids[:-1] if ended else ids
    text = _decode(tokenizer, content)
    found = [text.find(stop) for stop in stop_strings if stop in text]
    if not found:
        return Reply(text, "eos" if ended else "length", len(ids))
    tokens = next(
        count
        for count in range(1, len(content) + 1)
        if any(stop in _decode(tokenizer, content[:count]) for stop in stop_strings)
    )
    return Reply(text[: min(found)], "stop", tokens)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def eos_token_ids(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Every id that ends a reply: the tokenizer's EOS and those the checkpoint names (Llama 3)."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    return frozenset(token for token in ids if token is not None)


def _decoder_start_token_id(model: nn.Module, settings: GenerationConfig) -> int | None:
    configured = getattr(model.config, "decoder_start_token_id", None)
    return settings.decoder_start_token_id if configured is None else configured

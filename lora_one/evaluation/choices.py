r"""How probable a model finds each of a few given replies, without generating any.

    log p(choice | prompt) = sum_i log p(c_i | prompt, c_1 ... c_{i-1})

over the choice's token ids c, in fp32. The argmax is restricted-choice accuracy. With two
one-token choices it is the "soft" metric of the released LoRA-GA and LoRA-One code for T5 on GLUE
(right label's probability against the flipped label's), here for any number of labels.

Prompt and choice are tokenised as ``tasks.encoding.encode`` does for training: apart, and joined
as ids. Whether the end of the reply counts is one rule per row: where no choice's ids begin
another's, a reply can begin with one choice only, and the probabilities are those of the reply
*beginning* with the choice. Where one does ("entail", "entailment"), the shorter would include the
longer, so every choice of that row is taken with the end-of-sequence token: the probability that
the reply *is* the choice.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any

import torch
from torch import Tensor, nn

from lora_one.errors import InputError
from lora_one.evaluation.context import context_of
from lora_one.evaluation.mode import evaluation_mode, input_device
from lora_one.tasks.encoding import (
    IGNORED,
    Architecture,
    encode_prompts,
    encode_targets,
    eos_token_id,
    padding_id,
)

Ids = tuple[int, ...]


@dataclass(frozen=True)
class _Job:
    """One forward pass over a prompt and a stem: it gives every choice whose stem begins it.

    The stem of a choice is its ids but the last, since the last is only predicted. Choices that
    differ in their last token, one-token choices above all, share one pass.
    """

    row: int
    prompt: list[int]
    stem: Ids

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.stem)


def choice_log_probabilities(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    *,
    architecture: Architecture,
    batch_size: int,
) -> list[list[float]]:
    """Return log p(choice | prompt) for every choice of every prompt, the same at any batch size.

    Args:
        model: A causal or seq2seq language model, or a ``PeftModel`` of one; left in the mode it
            came in.
        tokenizer: Its tokenizer; padding side and pad token do not matter.
        prompts: The texts.
        choices: For each prompt, the replies that come into question.
        architecture: ``causal`` or ``seq2seq``.
        batch_size: Sequences in one forward pass, at most.

    Returns:
        For each prompt the log-probabilities in nats, in the order of its choices; an empty list
        where prompt and choices do not fit into the model's context.

    Raises:
        InputError: ``batch_size`` below 1, another architecture, prompts and choices of different
            number, a prompt without choices, or two choices with the same token ids.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}; expected at least 1")
    if architecture not in ("causal", "seq2seq"):
        raise InputError(f"architecture='{architecture}'; choices need causal or seq2seq")
    if len(prompts) != len(choices):
        raise InputError(f"{len(prompts)} prompts and {len(choices)} lists of choices")
    if not prompts:
        return []
    ids = _choice_ids(tokenizer, choices)
    prompt_ids = encode_prompts(prompts, tokenizer, architecture=architecture)
    jobs = [job for row in range(len(prompts)) for job in _jobs(row, prompt_ids[row], ids[row])]
    context = context_of(model.config, architecture, tokenizer)
    jobs = _that_fit(context, jobs, architecture)
    # Longest first: a batch size that does not fit fails at once instead of at the end.
    jobs.sort(key=lambda job: -job.length)
    found: list[dict[Ids, float]] = [{} for _ in prompts]
    pad = padding_id(tokenizer)
    forward = _causal_logits if architecture == "causal" else _seq2seq_logits
    with evaluation_mode(model):
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            for job, logits in zip(batch, forward(model, batch, pad), strict=True):
                log_p = torch.log_softmax(logits.float(), dim=-1)
                for choice in ids[job.row]:
                    if _begins(choice[:-1], job.stem):
                        steps = log_p[range(len(choice)), list(choice)].tolist()
                        found[job.row][choice] = fsum(steps)
    return [
        [by_choice[choice] for choice in row] if by_choice else []
        for by_choice, row in zip(found, ids, strict=True)
    ]


def _choice_ids(tokenizer: Any, choices: Sequence[Sequence[str]]) -> list[list[Ids]]:
    """Tokenise the choices; with EOS where one of a row begins another of it."""
    distinct = sorted({choice for row in choices for choice in row})
    if any(not row for row in choices):
        raise InputError("a prompt without choices: there is nothing to compare")
    encoded = dict(zip(distinct, map(tuple, encode_targets(distinct, tokenizer)), strict=True))
    rows = []
    for row in choices:
        ids = [encoded[choice] for choice in row]
        if len(set(ids)) < len(ids) or () in ids:
            raise InputError(
                f"this tokenizer cannot tell the choices {list(row)} apart: two have the same "
                "token ids, or one has none"
            )
        ambiguous = any(a is not b and _begins(a, b) for a in ids for b in ids)
        rows.append([(*choice, eos_token_id(tokenizer)) for choice in ids] if ambiguous else ids)
    return rows


def _jobs(row: int, prompt: list[int], choices: Sequence[Ids]) -> Iterator[_Job]:
    """Yield one job for every stem that does not begin a longer one."""
    stems = {choice[:-1] for choice in choices}
    for stem in sorted(stems):
        if not any(stem != other and _begins(stem, other) for other in stems):
            yield _Job(row, prompt, stem)


def _begins(shorter: Ids, longer: Ids) -> bool:
    return longer[: len(shorter)] == shorter


def _that_fit(context: int | None, jobs: list[_Job], architecture: Architecture) -> list[_Job]:
    """Leave out all jobs of a row of which one is longer than the model can read."""
    if context is None:
        return jobs

    def read_at_once(job: _Job) -> int:
        # An encoder and a decoder read apart; the decoder reads the start token as well.
        return job.length if architecture == "causal" else max(len(job.prompt), len(job.stem) + 1)

    too_long = {job.row for job in jobs if read_at_once(job) > context}
    return [job for job in jobs if job.row not in too_long]


def _causal_logits(model: nn.Module, jobs: Sequence[_Job], pad: int) -> Iterator[Tensor]:
    """Yield for each job the logits (stem + 1, vocabulary) that follow prompt, stem_1, stem_2 ...

    Padding stands on the right, where no earlier position sees it, so that every model counts
    positions as in training, whether it learns, rotates or derives them.
    """
    device = input_device(model)
    inputs = _pad([[*job.prompt, *job.stem] for job in jobs], pad, device)
    spans = [range(len(job.prompt) - 1, job.length) for job in jobs]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" not in inspect.signature(base.forward).parameters:
        logits = model(**inputs, use_cache=False).logits
        for row, span in enumerate(spans):
            yield logits[row, span.start : span.stop]
        return
    # The logits of whole prompts are the largest tensor by far, and nobody reads them.
    kept = sorted({position for span in spans for position in span})
    place = {position: index for index, position in enumerate(kept)}
    keep = torch.tensor(kept, device=device)
    logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits
    for row, span in enumerate(spans):
        yield logits[row, [place[position] for position in span]]


def _seq2seq_logits(model: nn.Module, jobs: Sequence[_Job], pad: int) -> Iterator[Tensor]:
    """Yield for each job the decoder's logits (stem + 1, vocabulary), as above."""
    device = input_device(model)
    inputs = _pad([job.prompt for job in jobs], pad, device)
    width = max(len(job.stem) for job in jobs) + 1
    # Shifted as the training labels are; the last id of each row is shifted out, so any will do.
    labels = [[*job.stem, pad, *[IGNORED] * (width - len(job.stem) - 1)] for job in jobs]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.prepare_decoder_input_ids_from_labels(labels=torch.tensor(labels, device=device))
    logits = model(**inputs, decoder_input_ids=decoder, use_cache=False).logits
    for row, job in enumerate(jobs):
        yield logits[row, : len(job.stem) + 1]


def _pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    width = max(len(row) for row in rows)
    ids = [[*row, *[pad] * (width - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }

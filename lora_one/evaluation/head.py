"""Answers of a model with a classification head, as replies: a label word, or a score.

Nothing is generated. The reply is the word of the most probable class, so that every metric of a
task works as for a model that writes, and ``log p(class)`` takes the place of the choices'
probabilities. A head with a single output gives a score, written with four decimals and moved to
the nearer end of the scale where it lies outside.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_one.errors import InputError
from lora_one.evaluation.batching import BatchSize, choice_rows
from lora_one.evaluation.context import context_of
from lora_one.evaluation.engines import Decoding
from lora_one.evaluation.finite import require_numbers
from lora_one.evaluation.generation import OnReplies, Reply
from lora_one.evaluation.mode import evaluation_mode, input_device
from lora_one.tasks.base import Example, Task
from lora_one.tasks.classification import encode_texts, require_texts
from lora_one.tasks.encoding import Collator, padding_id


def head_outputs(
    model: nn.Module, tokenizer: Any, texts: Sequence[tuple[str, ...]], *, batch_size: int
) -> list[list[float]]:
    """Return the head's outputs for one text or a pair each, in fp32.

    Args:
        model: A sequence classifier, or a ``PeftModel`` of one; left in the mode it came in.
        tokenizer: Its tokenizer.
        texts: What it reads.
        batch_size: Rows in one forward pass.

    Returns:
        The logits of each row; an empty list for a row that is longer than the model can read.
    """
    rows = encode_texts(texts, tokenizer)
    longest = context_of(model.config, "classification", tokenizer)
    fitting = [place for place, row in enumerate(rows) if len(row["input_ids"]) <= longest]
    fitting.sort(key=lambda place: -len(rows[place]["input_ids"]))
    collate = Collator(padding_id(tokenizer), "classification")
    device = input_device(model)
    outputs: list[list[float]] = [[] for _ in texts]
    with evaluation_mode(model):
        for start in range(0, len(fitting), batch_size):
            places = fitting[start : start + batch_size]
            batch = collate([{**rows[place], "labels": [0]} for place in places])
            del batch["labels"]
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            for place, logits in zip(places, model(**inputs).logits.float(), strict=True):
                outputs[place] = logits.tolist()
    return outputs


def refuse_sampling(decoding: Decoding) -> None:
    """Raise InputError if replies are to be drawn: a head has one answer to a row."""
    if decoding.sampling is not None or decoding.samples > 1:
        raise InputError(
            "a classification head draws no samples: give evaluation.samples=1 and "
            "evaluation.temperature=0"
        )


class HeadEngine:
    """Answers the rows of a task by reading their texts.

    Args:
        model: A sequence classifier, or a ``PeftModel`` of one.
        tokenizer: Its tokenizer.
        task: Gives the label words, or the ends of the scale.
        batch_size: Rows in one forward pass.
    """

    reads_texts = True

    def __init__(self, model: nn.Module, tokenizer: Any, task: Task, batch_size: BatchSize) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._task = task
        self._batch_size = choice_rows(batch_size)
        self._outputs: dict[str, list[float]] = {}

    def reply(
        self,
        examples: Sequence[Example],
        keys: Sequence[str],
        decoding: Decoding,
        on_replies: OnReplies,
    ) -> list[Reply]:
        """Answer with label words or scores; one too long to be read gets an empty reply.

        Raises:
            InputError: The rows are no classification, or are to be sampled.
            NonFiniteError: The head gives NaN.
        """
        require_texts(examples)
        refuse_sampling(decoding)
        replies = []
        for start in range(0, len(examples), self._batch_size):
            part = examples[start : start + self._batch_size]
            texts = [example.texts for example in part]
            outputs = head_outputs(self._model, self._tokenizer, texts, batch_size=self._batch_size)
            for example, logits in zip(part, outputs, strict=True):
                require_numbers(logits, example.row_id)
            self._outputs.update(zip([e.row_id for e in part], outputs, strict=True))
            made = [self._reply(logits) for logits in outputs]
            on_replies(range(start, start + len(part)), made)
            replies += made
        return replies

    def compare(self, examples: Sequence[Example]) -> list[list[float]]:
        """Return the log-probabilities of the classes of rows that were answered.

        The classes are the choices, in the same order.
        """
        outputs = (self._outputs[example.row_id] for example in examples)
        return [torch.tensor(row).log_softmax(-1).tolist() if row else [] for row in outputs]

    def _reply(self, logits: list[float]) -> Reply:
        if not logits:
            return Reply("", "length", 0)
        if self._task.labels:
            best = max(range(len(logits)), key=logits.__getitem__)
            return Reply(self._task.labels[best], "eos", 0)
        low, high = self._task.score_range
        return Reply(f"{min(max(logits[0], low), high):.4f}", "eos", 0)

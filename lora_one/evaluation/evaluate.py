"""Generate a reply to every example, score it, and summarise."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_one.errors import InputError
from lora_one.evaluation.generation import generate_replies
from lora_one.tasks.base import Example, Task
from lora_one.tasks.encoding import Architecture


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of one evaluation and every scored row.

    Attributes:
        metrics: What ``task.summarise`` gives (``n``, ``accuracy``, ``unparsed``, and each per
            scorer), and ``truncated`` (fraction of replies ended by length), ``reply_tokens``
            (mean), ``seconds`` (generation and scoring), ``answers_per_second``.
        rows: JSON-ready dicts, the lines of ``predictions.jsonl``, in the order of the examples:
            ``row_id``, ``prompt``, ``reply`` (raw), ``reference``, ``scores`` (per scorer
            ``parsed`` and ``correct``), ``stop_reason``, ``tokens``.
    """

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


def evaluate_task(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    *,
    architecture: Architecture,
    batch_size: int,
    max_new_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Evaluate a model on examples of a task.

    Args:
        model: Model or ``PeftModel``; left in the mode it came in.
        tokenizer: Its tokenizer.
        task: Gives the stop strings, the verdicts and the metrics.
        examples: From ``task.load``.
        architecture: ``causal`` or ``seq2seq``.
        batch_size: Prompts decoded together.
        max_new_tokens: Longest reply.
        progress: Called with (replies finished, replies in all).

    Raises:
        InputError: There is no example.
    """
    if not examples:
        raise InputError(f"{task.name}: there is no example to evaluate")
    start = time.perf_counter()
    replies = generate_replies(
        model,
        tokenizer,
        [example.prompt for example in examples],
        architecture=architecture,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        stop_strings=task.stop_strings,
        progress=progress,
    )
    verdicts = task.judge([reply.text for reply in replies], examples)
    rows = [
        {
            "row_id": example.row_id,
            "prompt": example.prompt,
            "reply": reply.text,
            "reference": example.reference,
            "scores": scores,
            "stop_reason": reply.stop_reason,
            "tokens": reply.tokens,
        }
        for example, reply, scores in zip(examples, replies, verdicts, strict=True)
    ]
    seconds = time.perf_counter() - start
    metrics = {
        **task.summarise(rows),
        "truncated": sum(reply.stop_reason == "length" for reply in replies) / len(replies),
        "reply_tokens": sum(reply.tokens for reply in replies) / len(replies),
        "seconds": seconds,
        "answers_per_second": len(replies) / seconds,
    }
    return EvaluationResult(metrics, rows)

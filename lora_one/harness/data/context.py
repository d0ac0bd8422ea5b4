"""What in a benchmark is longer than the model can read. Nothing is ever cut.

A training row longer than ``model.max_length`` is left out and counted; one longer than the model's
context is refused, since the setting admits what the model cannot read. A prompt that fills the
context cannot be left out without changing the benchmark: its reply is empty, counts as wrong, and
is announced before the run. Where all of them do, there is nothing to measure, and the run refused.
"""

from collections.abc import Sequence
from typing import Any

from lora_one.errors import InputError
from lora_one.tasks import Example
from lora_one.tasks.classification import encode_texts
from lora_one.tasks.encoding import EncodedRows, encode_prompts

# Special tokens around a text.
_AROUND = 8


def prompt_room(context: int | None, architecture: str, max_new_tokens: int) -> int | None:
    """Return the longest prompt that leaves room for a whole reply; None where any does."""
    if context is None or architecture != "causal":
        return context  # an encoder's context is not shared with the reply
    return context - max_new_tokens


def require_context(context: int | None, split: str, rows: EncodedRows) -> None:
    """Refuse rows that the model cannot read whole.

    Raises:
        InputError: The longest row has more tokens than the model's context.
    """
    longest = max(rows.lengths)
    if context is not None and longest > context:
        raise InputError(
            f"model.max_length={rows.max_length} admits a {split} row of {longest} tokens, and the "
            f"model reads {context} at most. Set model.max_length={context}: longer rows are left "
            "out and counted."
        )


def count_filling(
    context: int | None, examples: Sequence[Example], tokenizer: Any, architecture: str
) -> int:
    """Count the prompts that leave no room for a reply (a head: the texts that do not fit)."""
    if context is None:
        return 0
    # A token is at least a byte, so that most benchmarks need not be tokenised for this.
    long = [e for e in examples if _bytes(e, architecture) + _AROUND >= context]
    if not long:
        return 0
    if architecture == "classification":
        rows = encode_texts([example.texts for example in long], tokenizer)
        return sum(len(row["input_ids"]) > context for row in rows)
    prompts = encode_prompts([e.prompt for e in long], tokenizer, architecture=architecture)
    # An encoder's context is not shared with the reply.
    room = 1 if architecture == "causal" else 0
    return sum(len(ids) + room > context for ids in prompts)


def require_room(context: int | None, filling: int, rows: int) -> None:
    """Refuse an evaluation whose replies would all be empty.

    Raises:
        InputError: Every one of the test rows fills the context.
    """
    if rows and filling == rows:
        raise InputError(
            f"every test prompt ({rows:,} of {rows:,}) fills the model's context of {context} "
            "tokens, so that no reply could be written and every score would be 0. Choose a model "
            "that reads more, or give shorter prompts (fewer dataset.shots, if there are any)."
        )


def _bytes(example: Example, architecture: str) -> int:
    texts = example.texts if architecture == "classification" else (example.prompt,)
    return sum(len(text.encode()) for text in texts)

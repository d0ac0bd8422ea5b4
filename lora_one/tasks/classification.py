"""Rows for a model with a classification head: texts in, one class index or score as the label."""

from collections.abc import Sequence
from typing import Any

from lora_one.errors import InputError
from lora_one.tasks.base import Example


def encode_texts(texts: Sequence[tuple[str, ...]], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Tokenise one text or a pair each, as the model was pretrained to read them.

    A pair goes through the tokenizer as a pair, so that its own separators and segment ids come
    in between: ``<s> a </s></s> b </s>`` for RoBERTa, ``[CLS] a [SEP] b [SEP]`` for BERT.

    Returns:
        ``input_ids`` and, where the tokenizer makes them, ``token_type_ids`` of every row.
    """
    columns = [list(column) for column in zip(*texts, strict=True)]
    # Not verbose: the tokenizer would warn of rows longer than the model, which are left out.
    encoded = tokenizer(*columns, verbose=False)
    names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
    return [{name: encoded[name][row] for name in names} for row in range(len(texts))]


def head_label(example: Example) -> int | float:
    """Return the class index of the target, or the score where there are no classes."""
    if example.choices:
        return example.choices.index(example.target)
    return float(example.reference)


def require_texts(examples: Sequence[Example]) -> None:
    """Raise InputError unless the rows have texts for a classification head."""
    if not all(example.texts for example in examples):
        raise InputError(
            f"row {examples[0].row_id} is no classification: model.type=SequenceClassification "
            "needs a benchmark with labels, such as dataset=sst2"
        )

"""The rows of a run: loaded, selected, encoded, and accounted for."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lora_one.errors import InputError
from lora_one.harness.config import Config, DatasetConfig
from lora_one.harness.ranks import world_size
from lora_one.harness.task_options import arguments, has_order
from lora_one.tasks import Example, Task, create_task
from lora_one.tasks.encoding import Collator, EncodedRows, encode, token_counter

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Data:
    """What a run learns from and is scored on.

    Attributes:
        task: The benchmark, which also scores.
        train: Encoded training rows, in the order of the selection.
        validation: Encoded rows for the validation loss.
        test: Rows to answer.
        facts: Counts, drops, sources, template and the hash of the row ids, for the record.
    """

    task: Task
    train: EncodedRows
    validation: EncodedRows
    test: list[Example]
    facts: dict[str, Any]


def make_task(dataset: DatasetConfig) -> Task:
    """Create the benchmark with the options that it reads."""
    return create_task(dataset.name, **arguments(dataset.name, dataset.options, dataset.common))


def load_data(config: Config, tokenizer: PreTrainedTokenizerBase, architecture: str) -> Data:
    """Load all three splits and encode what carries loss.

    Raises:
        InputError: a missing or malformed file, or no row that fits ``model.max_length``.
    """
    dataset = config.dataset
    task = make_task(dataset)
    count = token_counter(tokenizer)
    # A benchmark with an order of its own has already settled it.
    shuffle = not has_order(dataset.name)
    train = _select(task.load("train", count_tokens=count), dataset.train_rows, dataset, shuffle)
    validation = _select(
        task.load("validation", count_tokens=count), dataset.validation_rows, dataset, shuffle
    )
    test = _select(task.load("test", count_tokens=count), dataset.test_rows, dataset, shuffle=False)
    encoded = {
        split: encode(
            examples,
            tokenizer,
            max_length=config.model.max_length,
            architecture=architecture,
            loss_on=dataset.loss_on,
        )
        for split, examples in (("train", train), ("validation", validation))
    }
    facts = {
        "rows": {
            "train": len(encoded["train"]),
            "validation": len(encoded["validation"]),
            "test": len(test),
        },
        "dropped_too_long": {split: rows.dropped for split, rows in encoded.items()},
        "train_tokens": encoded["train"].tokens,
        "train_row_ids_sha256": _hash(encoded["train"].row_ids),
        "test_row_ids_sha256": _hash([example.row_id for example in test]),
        "sources": task.sources,
        "counts": task.counts,
        "template": {"prompt": task.template.prompt, "target": task.template.target},
    }
    return Data(task, encoded["train"], encoded["validation"], test, facts)


def _select(
    examples: list[Example], limit: int | None, dataset: DatasetConfig, shuffle: bool
) -> list[Example]:
    if shuffle:
        examples = list(examples)
        random.Random(dataset.seed).shuffle(examples)
    return examples[:limit]


def _hash(row_ids: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(row_ids).encode()).hexdigest()


def batches_of(rows: Sequence[dict[str, Any]], size: int, collator: Collator) -> list[Batch]:
    """Cut rows into padded batches, in order."""
    return [collator(rows[start : start + size]) for start in range(0, len(rows), size)]


def init_batches(config: Config, data: Data, collator: Collator) -> list[Batch]:
    """Take the rows of the one-step gradient: the first ``bsz x iters`` that are short enough.

    A method without a gradient has its init loss reported on the first eight rows, or on one per
    rank where there are more ranks.

    Raises:
        InputError: if there are not so many, or fewer micro-batches than ranks.
    """
    init = config.init
    if init.bsz is None:
        return batches_of(data.train.rows[: max(8, world_size())], 1, collator)
    if init.iters < world_size():
        raise InputError(
            f"init.iters={init.iters} micro-batches cannot be shared by {world_size()} ranks: give "
            f"init.iters={world_size()} or more (and a smaller init.bsz for the same rows)."
        )
    needed = init.bsz * init.iters
    short = [row for row in data.train.rows if len(row["input_ids"]) <= init.max_length]
    if len(short) < needed:
        raise InputError(
            f"init.bsz={init.bsz} x init.iters={init.iters} asks for {needed} rows of at most "
            f"init.max_length={init.max_length} tokens, and there are {len(short)}."
        )
    return batches_of(short[:needed], init.bsz, collator)

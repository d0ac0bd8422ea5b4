"""The rows of a run: loaded, selected, encoded, and accounted for."""

import hashlib
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lora_one.errors import InputError
from lora_one.harness.config import GRADIENT_METHODS, Config, DatasetConfig
from lora_one.harness.ranks import world_size
from lora_one.harness.task_options import arguments, has_order
from lora_one.tasks import Example, Task, create_task
from lora_one.tasks.base import Split
from lora_one.tasks.encoding import Collator, EncodedRows, encode, token_counter

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Data:
    """What a run learns from and is scored on.

    Attributes:
        task: The benchmark, which also scores.
        train: Encoded training rows, in the order of the selection; None where nothing needs them.
        validation: Encoded rows for the validation loss; None where there are no training rows.
        test: Rows to answer.
        probe: A few encoded rows to compare two models on.
        facts: Counts, drops, sources, template and the hash of the row ids, for the record.
    """

    task: Task
    train: EncodedRows | None
    validation: EncodedRows | None
    test: list[Example]
    probe: list[dict[str, list[int]]]
    facts: dict[str, Any]


def make_task(dataset: DatasetConfig) -> Task:
    """Create the benchmark with the options that it reads."""
    return create_task(dataset.name, **arguments(dataset.name, dataset.options, dataset.common))


def load_data(config: Config, tokenizer: PreTrainedTokenizerBase, architecture: str) -> Data:
    """Load the splits that the run needs and encode what carries loss.

    Without training, and without a start that takes a gradient, only the test rows are read.

    Raises:
        InputError: a missing or malformed file, no row that fits ``model.max_length``, or a
            benchmark that runs programs without the consent to do so.
    """
    dataset = config.dataset
    task = make_task(dataset)
    require_consent(config, task)
    count = token_counter(tokenizer)

    def read(split: Split, limit: int | None) -> list[Example]:
        # A benchmark with an order of its own has already settled it.
        shuffle = split != "test" and not has_order(dataset.name)
        return _select(task.load(split, count_tokens=count), limit, dataset, shuffle)

    def encoded(examples: list[Example], max_length: int) -> EncodedRows:
        return encode(
            examples,
            tokenizer,
            max_length=max_length,
            architecture=architecture,
            loss_on=dataset.loss_on,
        )

    train, validation = None, None
    if learns(config):
        try:
            train = encoded(read("train", dataset.train_rows), config.model.max_length)
        except InputError as error:
            if config.trains:
                raise
            raise InputError(
                f"init.direction={config.init.direction} takes a gradient of training rows, also "
                f"with train=none: {error}"
            ) from error
        validation = encoded(read("validation", dataset.validation_rows), config.model.max_length)
    test = read("test", dataset.test_rows)
    if validation is not None:
        probe = validation.rows[:2]
    else:
        shortest = sorted(test, key=lambda example: len(example.prompt))[:2]
        probe = encoded(shortest, sys.maxsize).rows
    facts = _facts(task, train, validation, test)
    return Data(task, train, validation, test, probe, facts)


def learns(config: Config) -> bool:
    """Tell whether the run needs training rows: to train, or for the gradient of the start."""
    if config.evaluate.adapter is not None:
        return False
    return config.trains or config.init.method in GRADIENT_METHODS


def require_consent(config: Config, task: Task) -> None:
    """Ask for the consent to run what the model writes, before it has written anything.

    Raises:
        InputError: the benchmark's scorer runs programs, and nobody agreed to it.
    """
    evaluation = config.evaluation
    if not task.executes_code or evaluation.allow_code_execution or evaluation.generate_only:
        return
    raise InputError(
        f"dataset={task.name} is scored by running the programs that the model writes. They run in "
        "a sandbox; agree to it with evaluation.allow_code_execution=true, or write the replies "
        "without judging them with evaluation.generate_only=true."
    )


def _facts(
    task: Task, train: EncodedRows | None, validation: EncodedRows | None, test: list[Example]
) -> dict[str, Any]:
    encoded = {"train": train, "validation": validation}
    kept = {split: rows for split, rows in encoded.items() if rows is not None}
    return {
        "rows": {split: 0 if rows is None else len(rows) for split, rows in encoded.items()}
        | {"test": len(test)},
        "dropped_too_long": {split: rows.dropped for split, rows in kept.items()},
        "train_tokens": 0 if train is None else train.tokens,
        "train_row_ids_sha256": None if train is None else _hash(train.row_ids),
        "test_row_ids_sha256": _hash([example.row_id for example in test]),
        "sources": task.sources,
        "counts": task.counts,
        "template": {"prompt": task.template.prompt, "target": task.template.target},
    }


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
    rank where there are more ranks; where no training rows were read it goes without.

    Raises:
        InputError: if there are not so many, or fewer micro-batches than ranks.
    """
    init = config.init
    if data.train is None:
        return []
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

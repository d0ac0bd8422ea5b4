"""The rows of a run: loaded, selected, encoded, and accounted for."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lora_one.errors import InputError
from lora_one.evaluation.context import context_of
from lora_one.harness.config.schema import Config, DatasetConfig
from lora_one.harness.config.task_options import arguments
from lora_one.harness.data.context import count_filling, prompt_room, require_context, require_room
from lora_one.harness.data.splits import Splits, count_contaminated, require_disjoint, splits
from lora_one.harness.distributed.parallelism import FORWARD_TAKES_ALL_RANKS
from lora_one.harness.distributed.ranks import world_size
from lora_one.harness.models.base import Base
from lora_one.tasks import Example, Task, create_task
from lora_one.tasks.encoding import Collator, EncodedRows, encode
from lora_one.tasks.mmlu import SHORTENED
from lora_one.tasks.packed import Packed
from lora_one.tasks.token_cache import TokenisedSplit

Batch = dict[str, torch.Tensor]

# Counts of a task that are no rows left out.
_NOT_LOST = {"read", "kept", "in the other of train and validation", SHORTENED}


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
        splits: What they came from; keeps what was encoded, when it is told to.
    """

    task: Task
    train: EncodedRows | None
    validation: EncodedRows | None
    test: list[Example]
    probe: Sequence[Packed]
    facts: dict[str, Any]
    splits: Splits


def make_task(dataset: DatasetConfig) -> Task:
    """Create the benchmark with the options that it reads."""
    return create_task(dataset.name, **arguments(dataset.name, dataset.options, dataset.common))


def load_data(config: Config, tokenizer: PreTrainedTokenizerBase, base: Base) -> Data:
    """Load the splits that the run needs, encoded where they carry loss.

    Without training, and without a start that looks at rows, only the test rows are read. What
    an earlier run has encoded is taken from the cache; nothing is written.

    Raises:
        InputError: a missing or malformed file, no row that fits ``model.max_length``, one that
            the model cannot read, a validation row that is a training row, no test prompt that
            leaves room for a reply, or a benchmark that runs programs without the consent to do so.
    """
    architecture = base.architecture
    context = context_of(base.config, architecture, tokenizer)
    task = make_task(config.dataset)
    require_consent(config, task)
    task.prompt_room = prompt_room(context, architecture, config.dataset.max_new_tokens)
    train, validation = None, None
    with splits(config, task, tokenizer, architecture) as source:
        if config.learns:
            train, validation = _load_train(config, source), source.load("validation")
            require_disjoint(train, validation)
            require_context(context, "training", train.encoded)
            require_context(context, "validation", validation.encoded)
        test = source.load_test()
    filling = 0
    if config.evaluation.metric == "task":
        filling = count_filling(context, test, tokenizer, architecture)
        require_room(context, filling, len(test))
    if validation is not None:
        probe = validation.encoded.rows[:2]
    else:
        shortest = sorted(test, key=lambda example: len(example.prompt))[:2]
        probe = encode(shortest, tokenizer, max_length=sys.maxsize, architecture=architecture).rows
    return Data(
        task,
        None if train is None else train.encoded,
        None if validation is None else validation.encoded,
        test,
        probe,
        _facts(task, train, validation, test) | {"test_prompts_too_long": filling},
        source,
    )


def _load_train(config: Config, source: Splits) -> TokenisedSplit:
    try:
        return source.load("train")
    except InputError as error:
        if config.trains:
            raise
        raise type(error)(
            f"init.direction={config.init.direction} starts from training rows, also "
            f"with train=none: {error}"
        ) from error


def require_consent(config: Config, task: Task) -> None:
    """Ask for the consent to run what the model writes, before it has written anything.

    Raises:
        InputError: the benchmark's scorer runs programs, and nobody agreed to it.
    """
    if not task.executes_code or config.evaluation.allow_code_execution:
        return
    if not config.evaluation.judges:
        return
    raise InputError(
        f"dataset={task.name} is scored by running the programs that the model writes. They run in "
        "a sandbox; agree to it with evaluation.allow_code_execution=true, or write the replies "
        "without judging them with evaluation.generate_only=true."
    )


def sandbox_remark(config: Config, task: Task) -> str | None:
    """Say how replies will be isolated where that is not the strongest way there is; else None.

    Raises:
        SandboxError: no sandbox works on this machine: better now than after the replies.
    """
    if not task.executes_code or not config.evaluation.judges:
        return None
    from lora_one.evaluation.sandbox import isolation

    return isolation().remark


def _facts(
    task: Task,
    train: TokenisedSplit | None,
    validation: TokenisedSplit | None,
    test: list[Example],
) -> dict[str, Any]:
    loaded = {"train": train, "validation": validation}
    encoded = {name: split.encoded for name, split in loaded.items() if split is not None}
    rows = {name: len(encoded[name]) if name in encoded else 0 for name in loaded}
    return {
        "rows": rows | {"test": len(test)},
        "dropped_too_long": {name: split.dropped for name, split in encoded.items()},
        "test_prompts_in_train": 0 if train is None else count_contaminated(train, test),
        "train_tokens": 0 if train is None else train.encoded.tokens,
        "train_row_ids_sha256": None if train is None else _hash(train.encoded.row_ids),
        "test_row_ids_sha256": _hash([example.row_id for example in test]),
        "sources": task.sources,
        "counts": task.counts,
        "template": asdict(task.template) | {"texts": list(task.template.texts)},
    }


def _hash(row_ids: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(row_ids).encode()).hexdigest()


def remarks(facts: Mapping[str, Any], max_length: int) -> list[str]:
    """Say in words which rows were left out, and which test rows are not unseen."""
    said = []
    for split, counts in facts["counts"].items():
        reasons = [f"{n:,} {why}" for why, n in counts.items() if n and why not in _NOT_LOST]
        if reasons:
            said.append(f"{split}: left out of {counts['read']:,} rows read: {', '.join(reasons)}")
        if counts.get(SHORTENED):
            said.append(f"{split}: {counts[SHORTENED]:,} of {counts['read']:,} {SHORTENED}")
    for split, dropped in facts["dropped_too_long"].items():
        if dropped:
            total = dropped + facts["rows"][split]
            said.append(
                f"{split}: {dropped:,} of {total:,} rows left out, longer than "
                f"model.max_length={max_length} tokens"
            )
    if facts["test_prompts_too_long"]:
        said.append(
            f"{facts['test_prompts_too_long']:,} of {facts['rows']['test']:,} test prompts fill "
            "the model's context; their replies are empty and count as wrong"
        )
    if facts["test_prompts_in_train"]:
        said.append(
            f"{facts['test_prompts_in_train']:,} of {facts['rows']['test']:,} test prompts are "
            "training prompts, word for word"
        )
    return said


def batches_of(rows: Sequence[dict[str, Any]], size: int, collator: Collator) -> list[Batch]:
    """Cut rows into padded batches, in order."""
    return [collator(rows[start : start + size]) for start in range(0, len(rows), size)]


def init_batches(config: Config, data: Data, collator: Collator) -> list[Batch]:
    """Take the rows that a start looks at: the first ``bsz x iters`` that are short enough.

    A method that looks at none has its init loss reported on the first eight rows, or on one per
    rank where there are more ranks; where there are too few training rows for that, or none were
    read, it goes without.

    Raises:
        InputError: if there are not so many, or fewer micro-batches than ranks.
    """
    init = config.init
    if data.train is None:
        return []
    in_step = config.parallelism in FORWARD_TAKES_ALL_RANKS
    if init.bsz is None:
        count = min(len(data.train), max(8, world_size()))
        if in_step or count < world_size():
            count -= count % world_size()
        return batches_of(data.train.rows[:count], 1, collator)
    if in_step and init.iters % world_size():
        raise InputError(
            f"init.iters={init.iters} micro-batches cannot be shared evenly by {world_size()} "
            f"ranks, and with parallelism={config.parallelism} every forward pass takes all of "
            f"them: give a multiple of {world_size()} (and init.bsz for the same rows)."
        )
    if init.iters < world_size():
        raise InputError(
            f"init.iters={init.iters} micro-batches cannot be shared by {world_size()} ranks: give "
            f"init.iters={world_size()} or more (and a smaller init.bsz for the same rows)."
        )
    needed = init.bsz * init.iters
    short = [i for i, length in enumerate(data.train.lengths) if length <= init.max_length]
    if len(short) < needed:
        raise InputError(
            f"init.bsz={init.bsz} x init.iters={init.iters} asks for {needed} rows of at most "
            f"init.max_length={init.max_length} tokens, and there are {len(short)}."
        )
    return batches_of([data.train[i] for i in short[:needed]], init.bsz, collator)

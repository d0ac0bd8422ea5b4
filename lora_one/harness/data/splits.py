"""The rows of a split: selected, encoded or found in the cache, and compared with other splits."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from lora_one.errors import InputError
from lora_one.harness.config.schema import Config, DatasetConfig
from lora_one.harness.config.task_options import has_order, path_options
from lora_one.harness.console import say
from lora_one.tasks import Example, Task, token_cache
from lora_one.tasks.base import Split
from lora_one.tasks.encoding import TrainedArchitecture, encode, token_counter
from lora_one.tasks.reads import Reads, recorded_reads
from lora_one.tasks.token_cache import Miss, TokenisedSplit, text_hashes

# Keys of the dataset section that decide neither the rows that carry loss nor their tokens.
_ELSEWHERE = {"max_new_tokens", "test_rows"}


def cache_folder(config: Config) -> Path:
    """Return where tokenised rows are kept: beside the runs, as the cached initialisations are.

    Not in the repository: a cluster's home folder is small, and ``output_dir`` is on its scratch
    disk; an installed package may not be writable at all.
    """
    return Path(config.output_dir) / "cache" / "tokens"


class Splits:
    """Loads the splits that carry loss, for one run.

    Args:
        config: The run.
        task: The benchmark.
        tokenizer: The base model's.
        architecture: Of the base model.
        reads: Grows by what is read. A task may read one source for two splits, so an entry of the
            cache depends on all that was read before it is stored.

    Attributes:
        keys: Names of the cache entries of the splits that were loaded.
        fresh: Per name of a cache entry, what was encoded because the cache did not have it.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        tokenizer: Any,
        architecture: TrainedArchitecture,
        reads: Reads,
    ) -> None:
        self.config = config
        self.task = task
        self.tokenizer = tokenizer
        self.architecture = architecture
        self.reads = reads
        self.keys: dict[Split, str] = {}
        self.fresh: dict[str, TokenisedSplit] = {}
        # One for both splits: a task that selects by length does so once.
        self._count = token_counter(tokenizer)

    def load(self, split: Split) -> TokenisedSplit:
        """Return a split from the cache or, where it is not there, from its source."""
        key = self.keys[split] = self._key(split)
        found = token_cache.load(cache_folder(self.config), key)
        if not isinstance(found, Miss):
            self.task.counts[split], self.task.sources[split] = found.counts, found.source
            for read in found.reads:
                self.reads.add(read)
            return found
        if found.reason is not None:
            say(f"note: {found.reason}; tokenising the {split} rows again")
        return self.fresh.setdefault(key, self._encode(split))

    def load_test(self) -> list[Example]:
        """Return the rows to answer, which are not encoded here."""
        examples = self.task.load("test", count_tokens=self._count)
        return take_evenly(examples, self.config.dataset.test_rows)

    def save(self) -> None:
        """Keep what was encoded, for the next run.

        Raises:
            OSError: It cannot be written.
        """
        for key, split in self.fresh.items():
            # A task that reads by other means than ours could change behind an entry.
            if split.reads:
                token_cache.store(cache_folder(self.config), key, split)

    def files(self) -> dict[Split, Path]:
        """Return the cache entry's file of every split that was loaded."""
        folder = cache_folder(self.config)
        return {split: token_cache.entry_file(folder, key) for split, key in self.keys.items()}

    def _encode(self, split: Split) -> TokenisedSplit:
        dataset = self.config.dataset
        examples = select(
            self.task.load(split, count_tokens=self._count),
            {"train": dataset.train_rows, "validation": dataset.validation_rows}[split],
            dataset,
        )
        encoded = encode(
            examples,
            self.tokenizer,
            max_length=self.config.model.max_length,
            architecture=self.architecture,
            loss_on=dataset.loss_on,
        )
        dropped = set(encoded.dropped_row_ids)
        kept = [example for example in examples if example.row_id not in dropped]
        return TokenisedSplit(
            encoded,
            text_hashes(kept, target=False),
            text_hashes(kept, target=True),
            self.task.counts.get(split, {}),
            self.task.sources.get(split),
            list(self.reads),
        )

    def _key(self, split: Split) -> str:
        dataset, folders = _resolved(self.config.dataset)
        template = self.task.template
        return token_cache.cache_key(
            self.tokenizer,
            folders,
            split=split,
            dataset=dataset,
            template=[template.prompt, template.target],
            max_length=self.config.model.max_length,
            architecture=self.architecture,
        )


@contextmanager
def splits(
    config: Config, task: Task, tokenizer: Any, architecture: TrainedArchitecture
) -> Iterator[Splits]:
    """Open the loader of a run's splits."""
    with recorded_reads() as reads:
        yield Splits(config, task, tokenizer, architecture, reads)


def select(examples: Sequence[Example], limit: int | None, dataset: DatasetConfig) -> list[Example]:
    """Shuffle rows by ``dataset.seed`` and cut them off at ``limit``.

    A benchmark with an order of its own has already settled it, and is not shuffled.
    """
    examples = list(examples)
    if not has_order(dataset.name):
        random.Random(dataset.seed).shuffle(examples)
    return examples[:limit]


def take_evenly(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """Take ``limit`` rows, as many of every part as of the others, as far as they go.

    A part is a subject or a source of a benchmark that joins several, which the row id names before
    the position. Parts take turns in the order in which they begin, and give their first rows; of a
    benchmark in one part these are its first ``limit``. The rows stay in order.
    """
    if limit is None or limit >= len(examples):
        return list(examples)
    parts: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        # "test/<subject>/12-3f9a0c1b", and of MATH "test/<subject>/<level>/12-3f9a0c1b".
        part = "/".join(example.row_id.split("/")[:-1][:2])
        parts.setdefault(part, []).append(place)
    turns = (place for turn in zip_longest(*parts.values()) for place in turn)
    taken = islice((place for place in turns if place is not None), limit)
    return [examples[place] for place in sorted(taken)]


def require_disjoint(train: TokenisedSplit, validation: TokenisedSplit) -> None:
    """Refuse a validation row that is a training row, too.

    Raises:
        InputError: Prompt and target of a row are in both.
    """
    shared = np.flatnonzero(np.isin(validation.texts, train.texts))
    if len(shared):
        first = validation.encoded.row_ids[shared[0]]
        raise InputError(
            f"{len(shared)} of {len(validation.encoded)} validation rows are training rows as well "
            f"(same prompt and target; the first is {first}), so that their loss would say "
            "nothing. Take them out of one of the two files."
        )


def count_contaminated(train: TokenisedSplit, test: Sequence[Example]) -> int:
    """Count the test rows whose prompt is a training prompt, word for word."""
    return int(np.isin(text_hashes(test, target=False), train.prompts).sum())


def _resolved(dataset: DatasetConfig) -> tuple[Mapping[str, Any], list[Path]]:
    """The dataset section with every path made absolute, and the folders among them."""
    facts = dataset.model_dump(mode="json", exclude=_ELSEWHERE)
    folders = []
    for key in path_options(dataset.name):
        if facts.get(key) is not None:
            path = Path(facts[key]).resolve()
            facts[key] = str(path)
            folders += [path] if path.is_dir() else []
    return facts, folders

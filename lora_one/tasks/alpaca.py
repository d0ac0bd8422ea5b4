"""Alpaca-cleaned (Taori et al. 2023, cleaned by the community) to learn from; tests on MMLU."""

from pathlib import Path
from typing import Literal

from lora_one.errors import InputError
from lora_one.tasks.base import CountTokens, Example, Origin, Split, check_split
from lora_one.tasks.instruction import InstructionTask
from lora_one.tasks.rows import (
    Rows,
    find_split_file,
    hold_out,
    hub_cache_holds,
    read_file,
    read_hub,
)

HUB_ID = "yahma/alpaca-cleaned"
REVISION = "12567cabf869d7c92e573c7c783905fc160e9639"


class Alpaca(InstructionTask):
    """Alpaca-cleaned, as LoRA-One's instruction run uses it (published: MMLU, direct prompting).

    The data set has one split. Validation is a slice of it, chosen by a seeded hash of the
    instruction, so that no instruction is on both sides; rows with an empty output are left out
    and counted.

    Args:
        path: A file with the columns ``instruction``, ``input`` and ``output``, or a folder with
            ``train.json`` or another format; None reads ``yahma/alpaca-cleaned`` from the hub.
        test_path: Folder with MMLU's files; None reads it from the hub.
        shots: Answered questions before each test question, 0 to 5.
        held_out_rows: Instructions held out for validation.
        split_seed: Seed of that choice.
        revision: Commit, tag or branch of the hub dataset; None is the pinned commit.
    """

    name = "alpaca"

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        test_path: str | Path | None = None,
        shots: Literal[0, 1, 2, 3, 4, 5] = 0,
        held_out_rows: int = 500,
        split_seed: int = 0,
        revision: str | None = None,
    ) -> None:
        super().__init__(test_path=test_path, shots=shots)
        self._path = None if path is None else Path(path)
        self._held_out_rows = held_out_rows
        self._split_seed = split_seed
        self._revision = revision or REVISION

    def origin(self) -> Origin:
        """Name where the training rows are; offline, MMLU must be there as well."""
        test_ready = self.test.origin().available_offline
        if self._path is not None:
            return Origin("local", str(self._path), self._path.exists() and test_ready)
        here = hub_cache_holds(HUB_ID, revision=self._revision)
        return Origin("hub", HUB_ID, here and test_ready)

    def load(self, split: Split, *, count_tokens: CountTokens | None = None) -> list[Example]:
        """Read one split."""
        check_split(split)
        if split == "test":
            return self.load_test(split, count_tokens)
        read = self._read()
        found = [self.example_from_row(row, "train", i) for i, row in enumerate(read.rows)]
        usable = [i for i, example in enumerate(found) if isinstance(example, Example)]
        if not usable:
            raise InputError(
                f"{read.source.get('file') or read.source['hub']}: all {len(read.rows)} rows have "
                "an empty 'output'; expected text to learn"
            )
        train, held_out = hold_out(
            [read.rows[i] for i in usable], self._held_out_rows, self._split_seed, "instruction"
        )
        kept = [usable[i] for i in (train if split == "train" else held_out)]
        self.sources[split] = read.source
        self.counts[split] = {
            "read": len(read.rows),
            "empty output": len(read.rows) - len(usable),
            "in the other of train and validation": len(usable) - len(kept),
            "kept": len(kept),
        }
        return [found[i] for i in kept]

    def _read(self) -> Rows:
        if self._path is None:
            return read_hub(HUB_ID, None, "train", self._revision)
        if self._path.is_dir():
            return read_file(find_split_file(self._path, "train"))
        return read_file(self._path)

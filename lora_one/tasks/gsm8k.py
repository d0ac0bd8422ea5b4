"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): 7,473 training and 1,319 test word problems."""

from pathlib import Path

from lora_one.tasks.base import CountTokens, Example, Origin, Split, check_split
from lora_one.tasks.grade_school import GradeSchoolTask
from lora_one.tasks.rows import (
    OWN_VALIDATION,
    Rows,
    find_split_file,
    has_split_file,
    hold_out,
    hub_cache_holds,
    read_file,
    read_hub,
)

HUB_ID = "openai/gsm8k"
HUB_CONFIG = "main"
REVISION = "740312add88f781978c0658806c59bc2815b9866"


class GSM8K(GradeSchoolTask):
    """GSM8K from the hub or from a folder with ``train.jsonl`` and ``test.jsonl``.

    GSM8K has no validation split. Published runs validate on the test set; here validation is a
    slice of the training rows, chosen by a seeded hash of the question, and ``train`` is the rest.
    A folder with its own ``validation.jsonl`` is used as it is.

    Args:
        path: Folder with local files; None reads ``openai/gsm8k``, config ``main``, from the hub.
        held_out_rows: Training questions held out for validation.
        split_seed: Seed of that choice. It is no run seed: runs that differ in it train and
            validate on different rows and cannot be compared.
        strip_calculator: Remove the ``<<48/2=24>>`` calculator annotations from the targets.
        revision: Commit, tag or branch of the hub dataset; None is the pinned commit.
    """

    name = "gsm8k"

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        held_out_rows: int = 500,
        split_seed: int = 0,
        strip_calculator: bool = True,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self._folder = None if path is None else Path(path)
        self._held_out_rows = held_out_rows
        self._split_seed = split_seed
        self._strip_calculator = strip_calculator
        self._revision = revision or REVISION

    def origin(self) -> Origin:
        """Name the folder or the hub id."""
        if self._folder is not None:
            return Origin("local", str(self._folder), self._folder.is_dir())
        here = all(
            hub_cache_holds(HUB_ID, HUB_CONFIG, split, self._revision)
            for split in ("train", "test")
        )
        return Origin("hub", HUB_ID, here)

    def load(self, split: Split, *, count_tokens: CountTokens | None = None) -> list[Example]:
        """Read one split; every row is used in exactly one of them."""
        check_split(split)
        own_file = split == "test" or self._has_validation_file()
        source_split = split if own_file else "train"
        read = self._read(source_split)
        indices = list(range(len(read.rows)))
        if not own_file:
            kept, held_out = hold_out(
                read.rows, self._held_out_rows, self._split_seed, own_file=OWN_VALIDATION
            )
            indices = kept if split == "train" else held_out
        examples = [
            self.example_from_row(
                read.rows[index], source_split, index, strip_calculator=self._strip_calculator
            )
            for index in indices
        ]
        self.sources[split] = read.source
        self.counts[split] = {"read": len(read.rows), "kept": len(examples)}
        if not own_file:
            self.counts[split]["in the other of train and validation"] = len(read.rows) - len(
                examples
            )
        return examples

    def _has_validation_file(self) -> bool:
        return self._folder is not None and has_split_file(self._folder, "validation")

    def _read(self, split: str) -> Rows:
        if self._folder is not None:
            return read_file(find_split_file(self._folder, split))
        return read_hub(HUB_ID, HUB_CONFIG, split, self._revision)

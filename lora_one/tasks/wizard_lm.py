"""WizardLM's evolved instructions (Xu et al. 2023, arXiv:2304.12244); tests on MMLU."""

from pathlib import Path
from typing import Literal

from lora_one.errors import InputError, nearest
from lora_one.tasks.base import CountTokens, Example, Origin, Split, check_split
from lora_one.tasks.instruction import InstructionTask
from lora_one.tasks.rows import (
    Row,
    Rows,
    find_split_file,
    hub_cache_holds,
    read_file,
    read_hub,
)
from lora_one.tasks.selection import Selection, in_order, select_in_order

# What the LoRA-GA code reads, and the data set of WizardLM's authors; both have 70,000 rows.
HUB_IDS = {
    "published": "silk-road/Wizard-LM-Chinese-instruct-evol",
    "original": "WizardLMTeam/WizardLM_evol_instruct_70k",
}
REVISIONS = {"published": None, "original": "16b48bd8eecad79d4f42e1ab641db317e1b27443"}
ORDERS = ("published", "shuffled")
REFUSALS = ("sorry", "as an ai")


class WizardLM(InstructionTask):
    """WizardLM's 70,000 instructions with the selection of the published LoRA-GA runs.

    Rows whose output says "sorry" or "as an ai", in any case, are left out, and rows with
    ``max_tokens`` tokens or more (published: 1,024, Llama-2's tokenizer; here the run's); of the
    others the first ``train_rows`` train and the next ``validation_rows`` validate, except rows
    whose prompt training has. LoRA-GA scored these runs by MT-bench, whose judge is GPT-4; here
    the test is MMLU.

    Args:
        path: A file with the columns ``instruction`` and ``output``, or a folder with
            ``train.json`` or another format; None reads the hub.
        source: ``published`` is the hub data set that LoRA-GA reads, which holds a translation
            beside WizardLM's rows; ``original`` that of WizardLM's authors.
        test_path: Folder with MMLU's files; None reads it from the hub.
        shots: Answered questions before each test question, 0 to 5.
        order: ``published`` is file order (their shuffle is without effect), or ``shuffled``.
        seed: Seed of the shuffle.
        max_tokens: Rows with this many tokens or more are left out; None keeps every length.
        train_rows: Rows for training, at most; None is all.
        validation_rows: Rows for validation, at most.
        revision: Commit, tag or branch of the hub dataset; None is the pinned commit, or the
            newest where none is pinned.
    """

    name = "wizard_lm"

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        source: Literal["published", "original"] = "published",
        test_path: str | Path | None = None,
        shots: Literal[0, 1, 2, 3, 4, 5] = 0,
        order: Literal["published", "shuffled"] = "published",
        seed: int = 0,
        max_tokens: int | None = 1024,
        train_rows: int | None = 52_000,
        validation_rows: int = 18_000,
        revision: str | None = None,
    ) -> None:
        super().__init__(test_path=test_path, shots=shots)
        for key, value, valid in (("order", order, ORDERS), ("source", source, HUB_IDS)):
            if value not in valid:
                raise InputError(
                    f"dataset.{key}='{value}'; valid: {', '.join(valid)}.{nearest(value, valid)}"
                )
        self._path = None if path is None else Path(path)
        self._hub_id = HUB_IDS[source]
        self._order = order
        self._seed = seed
        self._max_tokens = max_tokens
        self._train_rows = train_rows
        self._validation_rows = validation_rows
        self._revision = revision or REVISIONS[source]
        self._selected: tuple[CountTokens | None, Selection] | None = None

    def origin(self) -> Origin:
        """Name where the training rows are; offline, MMLU must be there as well."""
        test_ready = self.test.origin().available_offline
        if self._path is not None:
            return Origin("local", str(self._path), self._path.exists() and test_ready)
        here = hub_cache_holds(self._hub_id, revision=self._revision)
        return Origin("hub", self._hub_id, here and test_ready)

    def load(self, split: Split, *, count_tokens: CountTokens | None = None) -> list[Example]:
        """Read one split; ``count_tokens`` is needed for train and validation with ``max_tokens``.

        Raises:
            InputError: As ``Task.load``; and when too few rows are left.
        """
        check_split(split)
        if split == "test":
            return self.load_test(split, count_tokens)
        if self._selected is None or self._selected[0] is not count_tokens:
            self._selected = (count_tokens, self._select(count_tokens))
        selected = self._selected[1]
        examples = selected.train if split == "train" else selected.validation
        if not examples:
            raise InputError(f"{self.origin().location}: {selected.nothing_for(split)}")
        return examples

    def _select(self, count_tokens: CountTokens | None) -> Selection:
        read = self._read()
        selected = select_in_order(
            in_order(read.rows, self._order, self._seed),
            self._example,
            max_tokens=self._max_tokens,
            count_tokens=count_tokens,
            train_rows=self._train_rows,
            validation_rows=self._validation_rows,
        )
        for split in ("train", "validation"):
            self.sources[split] = {**read.source, "order": self._order}
            self.counts[split] = selected.counts_of(split)
        return selected

    def _example(self, row: Row, index: int) -> Example | str:
        output = row.fields.get("output")
        if isinstance(output, str) and any(words in output.lower() for words in REFUSALS):
            return "refusal"
        return self.example_from_row(row, "train", index)

    def _read(self) -> Rows:
        if self._path is None:
            return read_hub(self._hub_id, None, "train", self._revision)
        if self._path.is_dir():
            return read_file(find_split_file(self._path, "train"))
        return read_file(self._path)

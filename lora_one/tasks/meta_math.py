"""MetaMathQA (Yu et al. 2023, arXiv:2309.12284): training on rewritten GSM8K problems."""

from pathlib import Path
from random import Random
from typing import Literal

from lora_one.errors import InputError, nearest
from lora_one.tasks.base import CountTokens, Example, Origin, Split, check_split, make_example
from lora_one.tasks.grade_school import GradeSchoolTask
from lora_one.tasks.gsm8k import GSM8K
from lora_one.tasks.rows import Row, Rows, hub_cache_holds, read_file, read_hub

HUB_ID = "meta-math/MetaMathQA"
ANSWER_LINE = "\nThe answer is:"
_ORDERS = ("published", "shuffled")
_FILE_NAMES = ("MetaMathQA-395K.json", "train.jsonl", "train.json")
# Texts tokenised at a time: enough for the tokenizer's batching, small beside the 395,000 rows.
_CHUNK = 2000


class MetaMath(GradeSchoolTask):
    r"""MetaMathQA with the filter of the published LoRA-GA and LoRA-One runs; tests on GSM8K.

    The filter keeps rows whose ``type`` contains "GSM" and whose text has fewer than
    ``max_tokens`` tokens (published: 512, Llama-2's tokenizer; here the run's tokenizer); of those
    the first ``train_rows`` train and the next ``validation_rows`` validate. The target is the
    response cut before ``"\nThe answer is:"``, so it ends in GSM8K's ``#### n``.

    The published loaders call ``dataset.shuffle(seed=42)`` and drop the result: their order is
    file order, ``order="published"``. ``order="shuffled"`` permutes all rows before the filter.

    MetaMathQA rewrites each GSM8K question several times, so rewrites of one question may fall on
    both sides of the published train/validation border: that validation loss is optimistic. The
    test rows come from GSM8K's test split, which MetaMathQA does not use.

    Args:
        path: The json or jsonl file, or a folder with it; None reads the hub.
        test_path: Folder with GSM8K's ``test.jsonl``; None reads ``openai/gsm8k`` from the hub.
        order: ``published`` or ``shuffled``.
        seed: Seed of the shuffle.
        max_tokens: Rows with this many tokens or more are left out; None keeps every length.
        train_rows: Rows for training, at most.
        validation_rows: Rows for validation, at most.
        revision: Commit of the hub dataset; None is its newest.
    """

    name = "meta_math"

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        test_path: str | Path | None = None,
        order: Literal["published", "shuffled"] = "published",
        seed: int = 0,
        max_tokens: int | None = 512,
        train_rows: int = 100_000,
        validation_rows: int = 10_000,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        if order not in _ORDERS:
            raise InputError(
                f"dataset.order='{order}'; valid: {', '.join(_ORDERS)}.{nearest(order, _ORDERS)}"
            )
        self._path = None if path is None else Path(path)
        self._order = order
        self._seed = seed
        self._max_tokens = max_tokens
        self._train_rows = train_rows
        self._validation_rows = validation_rows
        self._revision = revision
        self._test = GSM8K(path=test_path)
        self._selected: tuple[CountTokens | None, list[Example]] | None = None

    def origin(self) -> Origin:
        """Name where the training rows are; offline, the GSM8K test rows must be there as well."""
        test_ready = self._test.origin().available_offline
        if self._path is not None:
            return Origin("local", str(self._path), self._path.exists() and test_ready)
        return Origin(
            "hub", HUB_ID, hub_cache_holds(HUB_ID, revision=self._revision) and test_ready
        )

    def load(self, split: Split, *, count_tokens: CountTokens | None = None) -> list[Example]:
        """Read one split; ``count_tokens`` is needed for train and validation with ``max_tokens``.

        Raises:
            InputError: As ``Task.load``; and when no row passes the filter, or too few are left
                for validation.
        """
        check_split(split)
        if split == "test":
            examples = self._test.load("test")
            self.sources[split] = self._test.sources["test"]
            self.counts[split] = self._test.counts["test"]
            return examples
        # Train and validation are two slices of one pass over 395,000 rows.
        if self._selected is None or self._selected[0] is not count_tokens:
            self._selected = (count_tokens, self._select(count_tokens))
        selected = self._selected[1]
        if split == "train":
            return selected[: self._train_rows]
        validation = selected[self._train_rows :]
        if not validation:
            raise InputError(
                f"{self.origin().location}: only {len(selected)} rows pass the filter and training "
                f"takes {self._train_rows}, which leaves none for validation; set "
                f"dataset.train_rows below {len(selected)}"
            )
        return validation

    def _select(self, count_tokens: CountTokens | None) -> list[Example]:
        if self._max_tokens is not None and count_tokens is None:
            raise InputError(
                f"dataset.max_tokens={self._max_tokens} selects rows by length, which needs a "
                "tokenizer: pass count_tokens=, or max_tokens=None to keep every length"
            )
        read = self._read()
        indexed = list(enumerate(read.rows))
        if self._order == "shuffled":
            Random(self._seed).shuffle(indexed)
        wanted = self._train_rows + self._validation_rows
        kept: list[Example] = []
        counts = {"read": 0, "type without GSM": 0, f"{self._max_tokens} tokens or more": 0}
        for start in range(0, len(indexed), _CHUNK):
            chunk = indexed[start : start + _CHUNK]
            grade_school = [pair for pair in chunk if "GSM" in pair[1].text("type")]
            examples = [self._example(row, index) for index, row in grade_school]
            short = self._short_enough(examples, count_tokens)
            counts["read"] += len(chunk)
            counts["type without GSM"] += len(chunk) - len(grade_school)
            counts[f"{self._max_tokens} tokens or more"] += len(examples) - len(short)
            kept += short
            if len(kept) >= wanted:
                break
        if not kept:
            raise InputError(
                f"{self.origin().location}: no row passes the filter (type contains 'GSM', fewer "
                f"than {self._max_tokens} tokens); of {counts['read']} rows read, "
                f"{counts['type without GSM']} have another type"
            )
        kept = kept[:wanted]
        for split in ("train", "validation"):
            rows = kept[: self._train_rows] if split == "train" else kept[self._train_rows :]
            self.sources[split] = {**read.source, "order": self._order}
            self.counts[split] = {**counts, "kept": len(rows)}
        return kept

    def _short_enough(
        self, examples: list[Example], count_tokens: CountTokens | None
    ) -> list[Example]:
        if self._max_tokens is None or count_tokens is None or not examples:
            return examples
        # The published filter counts prompt and target joined by a space.
        lengths = count_tokens([f"{example.prompt} {example.target}" for example in examples])
        return [e for e, length in zip(examples, lengths, strict=True) if length < self._max_tokens]

    def _example(self, row: Row, index: int) -> Example:
        prompt = self.template.prompt.format(question=row.text("query"))
        solution, _, answer = row.text("response").partition(ANSWER_LINE)
        target = self.template.target.format(answer=solution)
        return make_example("train", index, prompt, target, answer.strip() or None)

    def _read(self) -> Rows:
        if self._path is None:
            return read_hub(HUB_ID, None, "train", self._revision)
        if not self._path.is_dir():
            return read_file(self._path)
        for name in _FILE_NAMES:
            if (self._path / name).is_file():
                return read_file(self._path / name)
        found = ", ".join(sorted(entry.name for entry in self._path.iterdir())) or "nothing"
        raise InputError(
            f"{self._path}: none of {', '.join(_FILE_NAMES)} is there; it holds: {found}. "
            "Name the file itself with dataset.path=<file>"
        )

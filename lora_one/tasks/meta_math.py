"""MetaMathQA (Yu et al. 2023, arXiv:2309.12284): training on rewritten GSM8K and MATH problems."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lora_one.errors import InputError, nearest
from lora_one.tasks.base import (
    CountTokens,
    Example,
    Origin,
    Split,
    Task,
    Verdict,
    check_split,
    make_example,
)
from lora_one.tasks.grade_school import GradeSchoolTask
from lora_one.tasks.gsm8k import GSM8K
from lora_one.tasks.hendrycks_math import HendrycksMath
from lora_one.tasks.rows import Row, Rows, hub_cache_holds, read_file, read_hub
from lora_one.tasks.selection import (
    Selection,
    counted,
    in_order,
    select_by_group,
    select_in_order,
)

HUB_ID = "meta-math/MetaMathQA"
REVISION = "aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18"
ANSWER_LINE = "\nThe answer is:"
ORDERS = ("published", "shuffled")
SUBSETS = ("gsm_100k", "full")
_FILE_NAMES = ("MetaMathQA-395K.json", "train.jsonl", "train.json")
_BENCHMARKS: dict[str, type[GSM8K] | type[HendrycksMath]] = {"gsm8k": GSM8K, "math": HendrycksMath}


class MetaMath(GradeSchoolTask):
    r"""MetaMathQA as the published LoRA-GA and LoRA-One runs use it; tests on GSM8K or MATH.

    ``subset="gsm_100k"`` keeps rows whose ``type`` contains "GSM" and whose text has fewer than
    ``max_tokens`` tokens (published: 512, Llama-2's tokenizer; here the run's tokenizer); of those
    the first ``train_rows`` train and the next ``validation_rows`` validate. The target is the
    response cut before ``"\nThe answer is:"``, so it ends in GSM8K's ``#### n``.

    ``subset="full"`` keeps all 395,000 rows, MATH's as well. Several rows rewrite one
    ``original_question``: validation is ``validation_rows`` rows at most of whole original
    questions, chosen by a seeded hash, and training is every other row. The target is the whole
    response: many MATH rows state their answer in its last line only.

    In both, no prompt is in train and in validation; rows left out for that are counted. In
    ``gsm_100k`` two different rewrites of one question may still be on the two sides, as in the
    published runs, so that validation loss is optimistic. The test rows come from the test splits
    of GSM8K and MATH, which MetaMathQA does not use.

    The published loaders call ``dataset.shuffle(seed=42)`` and drop the result: their order is
    file order, ``order="published"``. ``order="shuffled"`` permutes all rows before the selection.

    Args:
        path: The json or jsonl file, or a folder with it; None reads the hub.
        test_path: Folder with the test benchmark's files; None reads it from the hub.
        test_benchmark: ``gsm8k`` or ``math``.
        subset: ``gsm_100k`` or ``full``.
        order: ``published`` or ``shuffled``.
        seed: Seed of the shuffle.
        split_seed: Seed of the questions held out from ``full``.
        max_tokens: Rows with this many tokens or more are left out; None keeps every length.
        train_rows: Rows for training, at most; None is all.
        validation_rows: Rows for validation, at most.
        revision: Commit, tag or branch of the hub dataset; None is the pinned commit.
    """

    name = "meta_math"

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        test_path: str | Path | None = None,
        test_benchmark: Literal["gsm8k", "math"] = "gsm8k",
        subset: Literal["gsm_100k", "full"] = "gsm_100k",
        order: Literal["published", "shuffled"] = "published",
        seed: int = 0,
        split_seed: int = 0,
        max_tokens: int | None = 512,
        train_rows: int | None = 100_000,
        validation_rows: int = 10_000,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        for key, value, valid in (
            ("order", order, ORDERS),
            ("subset", subset, SUBSETS),
            ("test_benchmark", test_benchmark, _BENCHMARKS),
        ):
            if value not in valid:
                raise InputError(
                    f"dataset.{key}='{value}'; valid: {', '.join(valid)}.{nearest(value, valid)}"
                )
        self._path = None if path is None else Path(path)
        self._full = subset == "full"
        self._order = order
        self._seed = seed
        self._split_seed = split_seed
        self._max_tokens = max_tokens
        self._train_rows = train_rows
        self._validation_rows = validation_rows
        self._revision = revision or REVISION
        self._test: Task = _BENCHMARKS[test_benchmark](path=test_path)
        self.scorers = self._test.scorers
        self._selected: tuple[CountTokens | None, Selection] | None = None

    def origin(self) -> Origin:
        """Name where the training rows are; offline, the test rows must be there as well."""
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
            return selected.train
        if not selected.validation:
            raise InputError(
                f"{self.origin().location}: training takes {len(selected.train)} rows, which "
                f"leaves none for validation (left out: {counted(selected.counts)}); set "
                f"dataset.train_rows below {len(selected.train)}"
            )
        return selected.validation

    def score(self, reply: str, example: Example) -> dict[str, Verdict]:
        """Judge a reply as the test benchmark does."""
        return self._test.score(reply, example)

    def judge(
        self, replies: Sequence[str], examples: Sequence[Example]
    ) -> list[dict[str, Verdict]]:
        """Judge replies as the test benchmark does."""
        return self._test.judge(replies, examples)

    def summarise(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Summarise as the test benchmark does."""
        return self._test.summarise(rows)

    def _select(self, count_tokens: CountTokens | None) -> Selection:
        read = self._read()
        rows = in_order(read.rows, self._order, self._seed)
        # The full set is split by question, so all of it is filtered first.
        selected = select_in_order(
            rows,
            self._example,
            max_tokens=self._max_tokens,
            count_tokens=count_tokens,
            train_rows=None if self._full else self._train_rows,
            validation_rows=self._validation_rows,
        )
        if not selected.train:
            raise InputError(
                f"{self.origin().location}: no row passes the filter; "
                f"left out: {counted(selected.counts)}"
            )
        if self._full:
            groups = [read.rows[_position(e)].text("original_question") for e in selected.train]
            selected = select_by_group(
                selected.train,
                groups,
                train_rows=self._train_rows,
                validation_rows=self._validation_rows,
                seed=self._split_seed,
                counts=selected.counts,
            )
        for split in ("train", "validation"):
            self.sources[split] = {**read.source, "order": self._order}
            self.counts[split] = selected.counts_of(split)
        return selected

    def _example(self, row: Row, index: int) -> Example | str:
        if not self._full and "GSM" not in row.text("type"):
            return "type without GSM"
        prompt = self.template.prompt.format(question=row.text("query"))
        solution, _, answer = row.text("response").partition(ANSWER_LINE)
        target = row.text("response") if self._full else solution
        return make_example(
            "train",
            index,
            prompt,
            self.template.target.format(answer=target),
            answer.strip() or None,
        )

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


def _position(example: Example) -> int:
    """Return the position in the source that the row id states."""
    return int(example.row_id.split("/")[1].split("-")[0])

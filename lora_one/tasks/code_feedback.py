"""CodeFeedback-Filtered-Instruction (Zheng et al. 2024, arXiv:2402.14658); tests on HumanEval."""

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
    Template,
    Verdict,
    check_split,
    make_example,
)
from lora_one.tasks.code_benchmark import CodeBenchmark
from lora_one.tasks.human_eval import HumanEval
from lora_one.tasks.instruction import WITHOUT_INPUT
from lora_one.tasks.mbpp import MBPP
from lora_one.tasks.replies import up_to_first_block
from lora_one.tasks.rows import (
    Row,
    Rows,
    find_split_file,
    hub_cache_holds,
    read_file,
    read_hub,
)
from lora_one.tasks.selection import Selection, in_order, select_in_order

HUB_ID = "m-a-p/CodeFeedback-Filtered-Instruction"
REVISION = "a08c213a9748c66c15d0225814be80a2e77adf4a"
FILE_NAME = "CodeFeedback-Filtered-Instruction.jsonl"
ORDERS = ("published", "shuffled")
BENCHMARKS: dict[str, type[CodeBenchmark]] = {"human_eval": HumanEval, "mbpp": MBPP}


class CodeFeedback(Task):
    """Code instructions with the selection of the published LoRA-GA and LoRA-One runs.

    The target is the answer up to the end of its first code block; answers without one are left
    out, and rows with ``max_tokens`` tokens or more (published: 1,024, Llama-2's tokenizer; here
    the run's). Of the others the first ``train_rows`` train and the next ``validation_rows``
    validate, except rows whose prompt training has. The answers are in many languages, column
    ``lang``; the published runs keep them all.

    Args:
        path: A file with the columns ``query`` and ``answer``, or a folder with
            ``CodeFeedback-Filtered-Instruction.jsonl`` or ``train.jsonl``; None reads the hub.
        test_path: File or folder of the test benchmark; None reads it from the hub.
        test_benchmark: ``human_eval`` or ``mbpp``, with their instruction prompts.
        order: ``published`` is file order (their shuffle is without effect), or ``shuffled``.
        seed: Seed of the shuffle.
        max_tokens: Rows with this many tokens or more are left out; None keeps every length.
        timeout_seconds: Wall time of a program and its tests, and its processor time.
        memory_mib: Memory of a program.
        train_rows: Rows for training, at most; None is all.
        validation_rows: Rows for validation, at most.
        revision: Commit, tag or branch of the hub dataset; None is the pinned commit.
    """

    name = "code_feedback"
    template = Template(prompt=WITHOUT_INPUT.replace("{instruction}", "{query}"), target="{answer}")
    scorers = CodeBenchmark.scorers
    primary_metric = CodeBenchmark.primary_metric
    executes_code = True

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        test_path: str | Path | None = None,
        test_benchmark: Literal["human_eval", "mbpp"] = "human_eval",
        order: Literal["published", "shuffled"] = "published",
        seed: int = 0,
        max_tokens: int | None = 1024,
        timeout_seconds: float = 10.0,
        memory_mib: int = 1024,
        train_rows: int | None = 100_000,
        validation_rows: int = 10_000,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        for key, value, valid in (
            ("order", order, ORDERS),
            ("test_benchmark", test_benchmark, BENCHMARKS),
        ):
            if value not in valid:
                raise InputError(
                    f"dataset.{key}='{value}'; valid: {', '.join(valid)}.{nearest(value, valid)}"
                )
        self._path = None if path is None else Path(path)
        self._order = order
        self._seed = seed
        self._max_tokens = max_tokens
        self._train_rows = train_rows
        self._validation_rows = validation_rows
        self._revision = revision or REVISION
        self._test = BENCHMARKS[test_benchmark](
            path=test_path,
            prompt_style="instruction",
            timeout_seconds=timeout_seconds,
            memory_mib=memory_mib,
        )
        self.stop_strings = self._test.stop_strings
        self._selected: tuple[CountTokens | None, Selection] | None = None

    def origin(self) -> Origin:
        """Name where the training rows are; offline, the test rows must be there as well."""
        test_ready = self._test.origin().available_offline
        if self._path is not None:
            return Origin("local", str(self._path), self._path.exists() and test_ready)
        here = hub_cache_holds(HUB_ID, revision=self._revision)
        return Origin("hub", HUB_ID, here and test_ready)

    def load(self, split: Split, *, count_tokens: CountTokens | None = None) -> list[Example]:
        """Read one split; ``count_tokens`` is needed for train and validation with ``max_tokens``.

        Raises:
            InputError: As ``Task.load``; and when too few rows are left.
        """
        check_split(split)
        if split == "test":
            examples = self._test.load("test")
            self.sources[split] = self._test.sources["test"]
            self.counts[split] = self._test.counts["test"]
            return examples
        if self._selected is None or self._selected[0] is not count_tokens:
            self._selected = (count_tokens, self._select(count_tokens))
        selected = self._selected[1]
        examples = selected.train if split == "train" else selected.validation
        if not examples:
            raise InputError(f"{self.origin().location}: {selected.nothing_for(split)}")
        return examples

    def score(self, reply: str, example: Example) -> dict[str, Verdict]:
        """Judge a reply to a test row as the test benchmark does."""
        return self._test.score(reply, example)

    def judge(
        self, replies: Sequence[str], examples: Sequence[Example]
    ) -> list[dict[str, Verdict]]:
        """Judge replies to test rows as the test benchmark does."""
        return self._test.judge(replies, examples)

    def summarise(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Summarise as the test benchmark does."""
        return self._test.summarise(rows)

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
        target = up_to_first_block(row.text("answer"))
        if target is None:
            return "no code block"
        prompt = self.template.prompt.format(query=row.text("query"))
        return make_example("train", index, prompt, target, None)

    def _read(self) -> Rows:
        if self._path is None:
            return read_hub(HUB_ID, None, "train", self._revision)
        if not self._path.is_dir():
            return read_file(self._path)
        if (self._path / FILE_NAME).is_file():
            return read_file(self._path / FILE_NAME)
        return read_file(find_split_file(self._path, "train"))

"""What the instruction data sets share: the Alpaca prompts, and MMLU as the test."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lora_one.tasks.base import (
    CountTokens,
    Example,
    Split,
    Task,
    Template,
    Verdict,
    make_example,
)
from lora_one.tasks.mmlu import MMLU
from lora_one.tasks.rows import Row

# The two templates of Stanford Alpaca (Taori et al. 2023), with a line end before the response.
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


class InstructionTask(Task):
    """Instructions with one response each, to learn from; tested on MMLU.

    The prompt is Stanford Alpaca's, the one with an input where a row has one. The test prompts are
    MMLU's own (``lora_one.tasks.mmlu``): direct prompting, no instruction around them.

    Args:
        test_path: Folder with MMLU's files; None reads it from the hub.
        shots: Answered questions before each test question, 0 to 5.
    """

    template = Template(prompt=WITHOUT_INPUT, target="{output}")
    scorers = MMLU.scorers
    stop_strings = MMLU.stop_strings

    def __init__(self, *, test_path: str | Path | None, shots: Literal[0, 1, 2, 3, 4, 5]) -> None:
        super().__init__()
        self.test = MMLU(path=test_path, shots=shots)

    def load_test(self, split: Split, count_tokens: CountTokens | None) -> list[Example]:
        """Read MMLU's split of that name."""
        self.test.prompt_room = self.prompt_room
        examples = self.test.load(split, count_tokens=count_tokens)
        self.sources[split] = self.test.sources[split]
        self.counts[split] = self.test.counts[split]
        return examples

    def example_from_row(self, row: Row, split: str, index: int) -> Example | str:
        """Format a row with the columns ``instruction``, ``output`` and, optionally, ``input``.

        Returns:
            The example, or why the row is left out: published files hold rows without an output.

        Raises:
            InputError: No instruction, or no column ``output``.
        """
        output = row.fields.get("output")
        if isinstance(output, str) and not output.strip():
            return "empty output"
        columns = {"instruction": row.text("instruction"), "output": row.text("output")}
        given = row.fields.get("input")
        template = WITHOUT_INPUT
        if isinstance(given, str) and given.strip():
            template, columns["input"] = WITH_INPUT, given
        target = self.template.target.format(**columns)
        return make_example(split, index, template.format(**columns), target, None)

    def score(self, reply: str, example: Example) -> dict[str, Verdict]:
        """Judge a reply to an MMLU question."""
        return self.test.score(reply, example)

    def summarise(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Summarise as MMLU does."""
        return self.test.summarise(rows)

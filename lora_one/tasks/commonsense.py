"""Commonsense-170K (Hu et al. 2023, LLM-Adapters): eight choice benchmarks in one schema."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_one.errors import InputError
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
from lora_one.tasks.rows import Row, hold_out, hub_cache_holds, read_file, read_hub

HUB_ID = "zwhe99/commonsense_170k"

_LABEL = re.compile(r"\b(true|false|(?:answer|solution|option|ending)\d)\b", re.IGNORECASE)
_STATEMENT = re.compile(r"the correct answer is", re.IGNORECASE)


class Commonsense(Task):
    """BoolQ, PIQA, SocialIQA, HellaSwag, WinoGrande, ARC-e, ARC-c and OpenBookQA, or some of them.

    Local files lie as in the LLM-Adapters repository, ``<path>/<part>/train.json`` and
    ``<part>/test.json`` with the columns ``instruction``, ``output`` and ``answer``; the parts that
    are there are used. Validation is a slice of the training rows, chosen by a hash.

    Args:
        path: Folder of parts; None reads the training rows from the hub.
        test_path: Folder of parts with the test rows; None: ``path``. The hub has none.
        held_out_rows: Training rows held out for validation.
        revision: Commit of the hub dataset; None is its newest.
    """

    name = "commonsense"
    template = Template(
        prompt=(
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
        ),
        target="{output}",
    )
    scorers = ("strict", "first_label")
    stop_strings = ("\n\n###",)

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        test_path: str | Path | None = None,
        held_out_rows: int = 500,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self._folder = None if path is None else Path(path)
        self._test_folder = self._folder if test_path is None else Path(test_path)
        self._held_out_rows = held_out_rows
        self._revision = revision

    def origin(self) -> Origin:
        """Name the folder or the hub id; the test rows must be there as well."""
        test_ready = self._test_folder is not None and self._test_folder.is_dir()
        if self._folder is not None:
            return Origin("local", str(self._folder), self._folder.is_dir() and test_ready)
        return Origin(
            "hub", HUB_ID, hub_cache_holds(HUB_ID, revision=self._revision) and test_ready
        )

    def load(self, split: Split, *, count_tokens: CountTokens | None = None) -> list[Example]:
        """Read one split of all parts, in the order of the parts' names."""
        check_split(split)
        if split == "test":
            parts = self._read_parts(self._test_folder, "test")
        elif self._folder is None:
            parts = {"hub": read_hub(HUB_ID, None, "train", self._revision)}
        else:
            parts = self._read_parts(self._folder, "train")
        rows = [(part, index, row) for part, r in parts.items() for index, row in enumerate(r.rows)]
        kept = list(range(len(rows)))
        if split != "test":
            train, held_out = hold_out(
                [row for *_, row in rows], self._held_out_rows, 0, "instruction"
            )
            kept = train if split == "train" else held_out
        self.sources[split] = {part: r.source for part, r in parts.items()}
        self.counts[split] = {"read": len(rows), "kept": len(kept)}
        source = "test" if split == "test" else "train"
        return [self._example(f"{source}/{rows[i][0]}", *rows[i][1:]) for i in kept]

    def score(self, reply: str, example: Example) -> dict[str, Verdict]:
        """Judge a reply.

        ``strict``: the label that follows the last "the correct answer is". ``first_label``: the
        first label anywhere in the reply, as LLM-Adapters scores.
        """
        statements = list(_STATEMENT.finditer(reply))
        said = reply[statements[-1].end() :] if statements else ""
        found = {"strict": _label(said), "first_label": _label(reply)}
        return {
            scorer: {"parsed": label, "correct": label == example.reference}
            for scorer, label in found.items()
        }

    def summarise(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Add the accuracy of each part to the accuracy over all rows."""
        metrics = super().summarise(rows)
        verdicts: dict[str, list[bool]] = {}
        for row in rows:
            part = row["row_id"].split("/")[1]
            verdicts.setdefault(part, []).append(row["scores"][self.scorers[0]]["correct"])
        return metrics | {f"accuracy_{p}": sum(v) / len(v) for p, v in sorted(verdicts.items())}

    def _read_parts(self, folder: Path | None, split: str) -> dict[str, Any]:
        if folder is None:
            raise InputError(
                "dataset=commonsense: the hub has no test rows in this schema. Give the folder of "
                "the LLM-Adapters repository's dataset/ with dataset.test_path=<folder>."
            )
        files = sorted(folder.glob(f"*/{split}.json"))
        if not files:
            raise InputError(
                f"{folder}: no <part>/{split}.json; expected folders such as boolq/ or piqa/ with "
                "train.json and test.json"
            )
        return {file.parent.name: read_file(file) for file in files}

    def _example(self, split: str, index: int, row: Row) -> Example:
        columns = {name: row.text(name) for name in ("instruction", "output", "answer")}
        label = _label(columns["answer"])
        if label is None:
            raise InputError(f"{row.place}: 'answer' is no label: {columns['answer']!r}")
        prompt = self.template.prompt.format(**columns)
        return make_example(split, index, prompt, self.template.target.format(**columns), label)


def _label(text: str) -> str | None:
    found = _LABEL.search(text)
    return found.group(1).lower() if found else None

"""Commonsense-170K (Hu et al. 2023, LLM-Adapters): eight choice benchmarks in one schema."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    group_accuracies,
    make_example,
)
from lora_one.tasks.rows import Row, Rows, hold_out, hub_cache_holds, read_file, read_hub

HUB_ID = "zwhe99/commonsense_170k"
REVISION: str | None = None  # no commit is published for it; the record keeps the one that was read
PARTS = (
    "ARC-Challenge",
    "ARC-Easy",
    "boolq",
    "hellaswag",
    "openbookqa",
    "piqa",
    "social_i_qa",
    "winogrande",
)

_LABEL = re.compile(r"\b(true|false|(?:answer|solution|option|ending)\d)\b", re.IGNORECASE)
_FORMAT = re.compile(r"Answer format:\s*((?:[a-z]+\d?/)+[a-z]+\d?)\s*$")
_STATEMENT = re.compile(r"the correct answer is", re.IGNORECASE)


class Commonsense(Task):
    """BoolQ, PIQA, SocialIQA, HellaSwag, WinoGrande, ARC-e, ARC-c and OpenBookQA, or some of them.

    Local files lie as in the LLM-Adapters repository, ``<path>/<part>/train.json`` and
    ``<part>/test.json`` with the columns ``instruction``, ``output`` and ``answer``; the parts that
    are there are used, or those asked for. ``path`` may also be the one file of all training rows,
    ``commonsense_170k.json``. Validation is a slice of the training rows, chosen by a hash.

    An instruction ends in the labels that come into question ("Answer format: true/false").
    ``choice`` takes the most probable of the replies with each of them; ``strict`` and
    ``first_label`` read a generated reply.

    Args:
        path: Folder of parts or file of all; None reads the training rows from the hub.
        test_path: Folder of parts with the test rows; None: ``path``. The hub has none.
        parts: Parts to train and, without ``test_parts``, to test on; None is every part there.
        test_parts: Parts to test on.
        held_out_rows: Training rows held out for validation.
        revision: Commit, tag or branch of the hub dataset; None is its newest.
    """

    name = "commonsense"
    template = Template(
        prompt=(
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
        ),
        target="{output}",
    )
    scorers = ("strict", "first_label", "choice")
    stop_strings = ("\n\n###",)

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        test_path: str | Path | None = None,
        parts: list[str] | None = None,
        test_parts: list[str] | None = None,
        held_out_rows: int = 500,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        for key, named in (("parts", parts), ("test_parts", test_parts)):
            _check_parts(key, named)
        self._path = None if path is None else Path(path)
        self._test_folder = self._path if test_path is None else Path(test_path)
        self._parts = parts
        self._test_parts = parts if test_parts is None else test_parts
        self._held_out_rows = held_out_rows
        self._revision = revision or REVISION

    def origin(self) -> Origin:
        """Name the folder or the hub id; the test rows must be there as well."""
        test_ready = self._test_folder is not None and self._test_folder.is_dir()
        if self._path is not None:
            return Origin("local", str(self._path), self._path.exists() and test_ready)
        return Origin(
            "hub", HUB_ID, hub_cache_holds(HUB_ID, revision=self._revision) and test_ready
        )

    def load(self, split: Split, *, count_tokens: CountTokens | None = None) -> list[Example]:
        """Read one split of all parts, in the order of the parts' names."""
        check_split(split)
        if split == "test":
            parts = _read_parts(self._test_folder, "test", self._test_parts)
        else:
            parts = self._read_train()
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
        parts = group_accuracies(rows, self.scorers[0], lambda row: row["row_id"].split("/")[1])
        macro = {"accuracy_macro": sum(parts.values()) / len(parts)} if parts else {}
        return super().summarise(rows) | macro | parts

    def _read_train(self) -> dict[str, Rows]:
        if self._path is not None and self._path.is_dir():
            return _read_parts(self._path, "train", self._parts)
        if self._parts is not None:
            raise InputError(
                f"dataset.parts={','.join(self._parts)}: the rows of "
                f"{self._path or HUB_ID} do not say their part; give the folder of the "
                "LLM-Adapters repository's dataset/ with dataset.path=<folder>"
            )
        if self._path is not None:
            return {"all": read_file(self._path)}
        return {"all": read_hub(HUB_ID, None, "train", self._revision)}

    def _example(self, split: str, index: int, row: Row) -> Example:
        columns = {name: row.text(name) for name in ("instruction", "output", "answer")}
        label = _label(columns["answer"])
        if label is None:
            raise InputError(f"{row.place}: 'answer' is no label: {columns['answer']!r}")
        offered = _FORMAT.search(columns["instruction"])
        labels = offered[1].split("/") if offered else []
        target = self.template.target.format(**columns)
        choices = tuple(re.sub(rf"\b{label}\b", other, target) for other in labels)
        if target not in choices or len(set(choices)) < len(labels):
            raise InputError(
                f"{row.place}: the instruction must end in 'Answer format: ' and the labels, "
                f"among them '{label}', which the output must hold; found labels "
                f"{', '.join(labels) or 'none'} and output {target!r}"
            )
        prompt = self.template.prompt.format(**columns)
        return make_example(split, index, prompt, target, label, choices)


def _check_parts(key: str, named: Sequence[str] | None) -> None:
    for part in named or ():
        if part not in PARTS:
            raise InputError(
                f"dataset.{key}: no part '{part}'; valid: {', '.join(PARTS)}.{nearest(part, PARTS)}"
            )
    if named is not None and (not named or len(set(named)) < len(named)):
        raise InputError(f"dataset.{key}={list(named)}: expected at least one part, each once")


def _read_parts(folder: Path | None, split: str, named: Sequence[str] | None) -> dict[str, Rows]:
    """Read ``<part>/<split>.json`` of the named parts, or of all that are there, by name."""
    if folder is None or not folder.is_dir():
        raise InputError(
            "dataset=commonsense: the hub has no test rows in this schema. Give the folder of "
            "the LLM-Adapters repository's dataset/ with dataset.test_path=<folder> "
            "(git clone https://github.com/AGI-Edgerunners/LLM-Adapters)"
            + ("." if folder is None else f"; {folder} is no folder.")
        )
    files = {file.parent.name: file for file in sorted(folder.glob(f"*/{split}.json"))}
    if not files:
        raise InputError(
            f"{folder}: no <part>/{split}.json; expected folders such as boolq/ or piqa/ with "
            "train.json and test.json"
        )
    for part in named or ():
        if part not in files:
            raise InputError(f"{folder}: no {part}/{split}.json; there are: {', '.join(files)}")
    return {part: read_file(file) for part, file in files.items() if part in (named or files)}


def _label(text: str) -> str | None:
    found = _LABEL.search(text)
    return found.group(1).lower() if found else None

"""Any file of the user's: prompt and target are templates over its columns."""

import re
from collections.abc import Sequence
from pathlib import Path
from string import Formatter

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
from lora_one.tasks.rows import (
    Row,
    Rows,
    find_split_file,
    has_split_file,
    hold_out,
    hub_cache_holds,
    read_file,
    read_hub,
)


class Custom(Task):
    r"""Rows of a local file or a hub data set, put into the user's own templates.

    ``dataset=custom dataset.path=my.jsonl dataset.test_path=test.jsonl
    "dataset.prompt='Q: {question}\nA: '" "dataset.target='{answer}'"``: ``{column}`` stands for a
    column, ``{{`` for a brace, and the two letters ``\n`` for a line end, which neither a shell nor
    Hydra would write. Fields are names of columns and nothing else: no attributes, indices,
    conversions or formats.

    Validation is ``validation_path``, or the file of that name in the folder, or a slice of the
    training rows chosen by a seeded hash of the prompt. Rows with an empty target are left out and
    counted.

    A reply is right by ``exact`` where it equals the reference up to case, spaces and a closing
    full stop, and by ``contains`` where it holds it as whole words and numbers: 5 is not in 1.5,
    .5, -5, 1/5 or 5,000, but in 5.0 and "10-5". With ``answer_pattern`` the primary scorer is
    ``pattern``: what the last match of the expression found (its first group, if
    it has one) is compared with the reference; no match is no answer.

    Args:
        path: File (json, jsonl, csv, tsv, parquet) of the training rows, or a folder with
            ``train``, ``test`` and perhaps ``validation``.
        hub_id: Data set on the hub instead, with the splits ``train`` and ``test``.
        hub_config: Its configuration.
        revision: Its commit, tag or branch; None is the newest.
        test_path: File of the test rows.
        validation_path: File of the validation rows.
        prompt: Template of the prompt.
        target: Template of what the model learns to reply.
        reference: Column with the answer that a reply is compared with; None is the whole target.
        answer_pattern: Regular expression that finds the answer in a reply.
        stop: Texts that end a reply; None is a line that begins as the prompt does.
        held_out_rows: Prompts held out of the training rows for validation; None: a tenth, at most
            500.
        split_seed: Seed of that choice.
    """

    name = "custom"
    template = Template(prompt="", target="")
    scorers = ("exact", "contains")

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        hub_id: str | None = None,
        hub_config: str | None = None,
        revision: str | None = None,
        test_path: str | Path | None = None,
        validation_path: str | Path | None = None,
        prompt: str | None = None,
        target: str | None = None,
        reference: str | None = None,
        answer_pattern: str | None = None,
        stop: list[str] | None = None,
        held_out_rows: int | None = None,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        if prompt is None or target is None:
            raise InputError(
                "dataset=custom needs dataset.prompt and dataset.target, templates over the "
                "columns of the file, such as \"dataset.prompt='Q: {question}\\nA: '\" "
                "\"dataset.target='{answer}'\""
            )
        if (path is None) == (hub_id is None):
            raise InputError(
                "dataset=custom needs its rows: give dataset.path=<file or folder> or "
                "dataset.hub_id=<id>, and not both"
            )
        self.template = Template(prompt=_unescape(prompt), target=_unescape(target))
        self._prompt = _pieces("prompt", self.template.prompt)
        self._target = _pieces("target", self.template.target)
        self._reference = reference
        self._pattern = _compiled(answer_pattern)
        if self._pattern is not None:
            self.scorers = ("pattern", *self.scorers)
        self.stop_strings = _stops(self._prompt) if stop is None else tuple(map(_unescape, stop))
        if "" in self.stop_strings:
            raise InputError(
                "dataset.stop holds an empty text, which would end every reply before it begins; "
                "expected texts such as '\\nQ:', or [] for none"
            )
        self._path = None if path is None else Path(path)
        self._hub = (hub_id, hub_config, revision)
        self._files = {
            split: Path(file)
            for split, file in (("test", test_path), ("validation", validation_path))
            if file is not None
        }
        self._held_out_rows = held_out_rows
        self._split_seed = split_seed

    def origin(self) -> Origin:
        """Name the file, the folder or the hub id."""
        hub_id, config, revision = self._hub
        if hub_id is None:
            return Origin("local", str(self._path), self._path.exists())
        return Origin("hub", hub_id, hub_cache_holds(hub_id, config, "train", revision))

    def load(self, split: Split, *, count_tokens: CountTokens | None = None) -> list[Example]:
        """Read one split; without rows of its own, validation is part of train."""
        check_split(split)
        own = split == "test" or self._has_validation()
        source_split = split if own else "train"
        read = self._read(source_split)
        found = [self._example(row, source_split, i) for i, row in enumerate(read.rows)]
        examples = [example for example in found if example is not None]
        if not examples:
            raise InputError(
                f"{read.source.get('file') or read.source['hub']}: all {len(read.rows)} rows have "
                f"an empty target; expected text from dataset.target={self.template.target!r}"
            )
        self.sources[split] = read.source
        self.counts[split] = {
            "read": len(read.rows),
            "empty target": len(read.rows) - len(examples),
        }
        if not own:
            # The prompt says what a row asks, whatever its columns are called.
            prompts = [Row(example.row_id, {"prompt": example.prompt}) for example in examples]
            train, held_out = hold_out(
                prompts,
                self._held_out_rows,
                self._split_seed,
                "prompt",
                "rows of their own with dataset.validation_path=<file>",
            )
            chosen = train if split == "train" else held_out
            self.counts[split]["in the other of train and validation"] = len(examples) - len(chosen)
            examples = [examples[index] for index in chosen]
        self.counts[split]["kept"] = len(examples)
        return examples

    def score(self, reply: str, example: Example) -> dict[str, Verdict]:
        """Compare a reply with the reference, in two or three ways."""
        if example.reference is None:
            raise InputError(f"{example.row_id}: a row without a reference cannot be scored")
        gold, said = _normalise(example.reference), _normalise(reply)
        whole = reply.strip() or None
        contained = bool(gold) and _holds(said, gold)
        verdicts: dict[str, Verdict] = {
            "exact": {"parsed": whole, "correct": bool(said) and said == gold},
            "contains": {"parsed": whole, "correct": contained},
        }
        if self._pattern is not None:
            matches = list(self._pattern.finditer(reply))
            answer = matches[-1][1 if self._pattern.groups else 0] if matches else None
            verdicts["pattern"] = {
                "parsed": answer,
                "correct": answer is not None and _normalise(answer) == gold,
            }
        return {scorer: verdicts[scorer] for scorer in self.scorers}

    def _example(self, row: Row, split: str, index: int) -> Example | None:
        prompt, target = _render(self._prompt, row), _render(self._target, row)
        if not prompt.strip():
            raise InputError(f"{row.place}: the prompt of this row is empty")
        if not target.strip():
            return None
        reference = target if self._reference is None else _value(row, self._reference)
        return make_example(split, index, prompt, target, reference.strip())

    def _has_validation(self) -> bool:
        in_folder = self._path is not None and self._path.is_dir()
        return "validation" in self._files or (
            in_folder and has_split_file(self._path, "validation")
        )

    def _read(self, split: str) -> Rows:
        if split in self._files:
            return read_file(self._files[split])
        hub_id, config, revision = self._hub
        if hub_id is not None:
            return read_hub(hub_id, config, split, revision)
        if self._path.is_dir():
            return read_file(find_split_file(self._path, split))
        if split == "train":
            return read_file(self._path)
        raise InputError(
            f"dataset.path={self._path} is a file of training rows; give the test rows with "
            "dataset.test_path=<file>, or a folder that holds train and test"
        )


Pieces = Sequence[tuple[str, str | None]]
"""A template in pieces: literal text, and the column that follows it, if any."""


def _pieces(key: str, template: str) -> Pieces:
    """Parse a template; anything but names of columns in its braces is an error."""
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise InputError(
            f"dataset.{key}={template!r}: {error}; write {{column}} for a column and {{{{ or }}}} "
            "for a brace"
        ) from None
    for _, field, form, conversion in parsed:
        if field is not None and (
            not field.strip() or form or conversion or set(field) & set(".[]")
        ):
            raise InputError(
                f"dataset.{key}={template!r}: braces hold the name of a column and nothing else "
                f"(no attribute, index, conversion or format), found '{field}'"
            )
    if not any(field for _, field, *_ in parsed):
        raise InputError(f"dataset.{key}={template!r} names no column: write {{column}}")
    return [(literal, field) for literal, field, *_ in parsed]


def _render(pieces: Pieces, row: Row) -> str:
    return "".join(
        literal + ("" if column is None else _value(row, column)) for literal, column in pieces
    )


def _value(row: Row, column: str) -> str:
    if column not in row.fields:
        raise InputError(
            f"{row.place}: no column '{column}'; columns here: {', '.join(row.fields) or 'none'}."
            f"{nearest(column, row.fields)}"
        )
    value = row.fields[column]
    if not isinstance(value, str | int | float):
        raise InputError(
            f"{row.place}: '{column}' is {value!r}; a template needs text or a number there"
        )
    return str(value)


def _unescape(template: str) -> str:
    return template.replace(r"\n", "\n").replace(r"\t", "\t")


def _stops(prompt: Pieces) -> tuple[str, ...]:
    """Stop where a model goes on to write the beginning of another prompt."""
    head = prompt[0][0].strip()
    return (f"\n{head}",) if head else ()


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise InputError(
            f"dataset.answer_pattern={pattern!r}: not a regular expression ({error})"
        ) from None


# A digit belongs to the number before it after a digit and one of these, or after the sign or the
# point that a number begins with; and to the one after it unless only zeros follow a point.
_NUMBER_BEFORE = r"(?<![0-9][.,:/])(?<!(?<![\w.])[-\N{MINUS SIGN}.])"
_NUMBER_AFTER = r"(?!\.0*[1-9]|[,:/][0-9])"


def _holds(text: str, gold: str) -> bool:
    before = _NUMBER_BEFORE if gold[0].isdigit() else ""
    after = _NUMBER_AFTER if gold[-1].isdigit() else ""
    return re.search(rf"(?<!\w){before}{re.escape(gold)}(?!\w){after}", text) is not None


def _normalise(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".").rstrip()

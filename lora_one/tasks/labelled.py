"""Benchmarks whose answer is one of a few labels, or a score: one class for GLUE and SuperGLUE."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

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
from lora_one.tasks.label_metrics import Metric, official_metrics
from lora_one.tasks.rows import (
    SUFFIXES,
    Row,
    Rows,
    hold_out,
    hub_cache_holds,
    read_file,
    read_hub,
    what_is_in,
)

_NUMBER = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True)
class Layout:
    """Files of a folder that belong together.

    Attributes:
        train: File names without suffix, all of them needed; ``*`` stands for anything.
        evaluation: The same for each split that is evaluated on, by its name on the hub; the
            first split is needed, the others are read where they are there.
        columns: Names of the columns of its ``.tsv`` files, where these have no header line.
    """

    train: tuple[str, ...]
    evaluation: Mapping[str, tuple[str, ...]]
    columns: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Subtask:
    """What tells one benchmark of a family from another.

    Attributes:
        name: ``dataset=`` name.
        hub_config: Its configuration in the family's hub dataset.
        prompt: Template over ``columns``.
        columns: Names of its text columns on the hub, each with other names that local files give
            it. Rows that agree in the first are held out together.
        texts: Templates of the one or two texts that an encoder reads.
        labels: Label words by class index; empty for a score.
        source_labels: The source's own words for the classes, where it has others.
        label_columns: Names of the label's column.
        metric: The official metric besides accuracy.
        score_range: Ends of the scale of a score.
        layouts: Local files; the first layout that is whole is used, or else the first of which
            there are evaluation files, or else training files.
        leave_out_malformed: Its ``.tsv`` files are known to have broken lines.
        primary_metric: What the comparison table shows.
    """

    name: str
    hub_config: str
    prompt: str
    columns: Mapping[str, tuple[str, ...]]
    texts: tuple[str, ...]
    layouts: tuple[Layout, ...]
    labels: tuple[str, ...] = ()
    source_labels: tuple[str, ...] = ()
    label_columns: tuple[str, ...] = ("label",)
    metric: Metric | None = None
    score_range: tuple[float, float] | None = None
    leave_out_malformed: bool = False
    primary_metric: str = "accuracy"


class LabelledText(Task):
    """A classification (or score) benchmark as text-to-text, and as texts for an encoder's head.

    Training is on the source's training rows. ``test`` is the source's *validation* split, as in
    the published tables, since the labels of its test split are hidden. ``validation`` is a slice
    of the training rows, chosen by a seeded hash of the first text, so that what is looked at
    during training is never what is reported, and no row is in two splits.

    Scorers: ``exact``, the reply but for surrounding blanks is the label word (a score: a number
    on the scale that rounds to the target); ``choice``, the most probable label word, which the
    evaluation compares (see ``lora_one.evaluation.choices``). The official metric is computed for
    each.

    Args:
        path: Folder with local files; None reads the hub.
        held_out_rows: Training rows (more exactly: different first texts) held out for validation;
            None: a tenth, at most 500.
        split_seed: Seed of that choice; runs that differ in it cannot be compared.
        revision: Commit of the hub dataset; None is its newest.
    """

    subtask: ClassVar[Subtask]
    hub_id: ClassVar[str]

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        held_out_rows: int | None = None,
        split_seed: int = 0,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self._folder = None if path is None else Path(path)
        self._held_out_rows = held_out_rows
        self._split_seed = split_seed
        self._revision = revision
        self._train: Rows | None = None

    def origin(self) -> Origin:
        """Name the folder or the hub id."""
        if self._folder is not None:
            return Origin("local", str(self._folder), self._folder.is_dir())
        needed = ["train", *self._evaluated()]
        config = self.subtask.hub_config
        here = [hub_cache_holds(self.hub_id, config, split, self._revision) for split in needed]
        return Origin("hub", self.hub_id, all(here))

    def load(self, split: Split, *, count_tokens: CountTokens | None = None) -> list[Example]:
        """Read one split."""
        check_split(split)
        if split == "test":
            return self._load_test()
        # Train and validation are two slices of the same rows.
        self._train = self._train or self._read("train")
        rows = self._train.rows
        first = next(iter(self.subtask.columns))
        # Named, since a blank text is a row like any other: Quora's pairs have a few.
        keys = [Row(row.place, {"key": f"{first}: {row.fields[first]}"}) for row in rows]
        kept, held_out = hold_out(keys, self._held_out_rows, self._split_seed, "key")
        indices = kept if split == "train" else held_out
        self.sources[split] = self._train.source
        self.counts[split] = {
            "read": len(rows),
            "kept": len(indices),
            "in the other of train and validation": len(rows) - len(indices),
            **_left_out(self._train),
        }
        return [self._example(rows[index], "train", index) for index in indices]

    def score(self, reply: str, example: Example) -> dict[str, Verdict]:
        """Judge the reply's text; the verdict on the label probabilities is the evaluation's."""
        said = reply.strip()
        if self.labels:
            parsed = said if said in self.labels else None
            return {"exact": {"parsed": parsed, "correct": parsed == example.target}}
        low, high = self.score_range
        readable = _NUMBER.fullmatch(said) and low <= float(said) <= high
        correct = bool(readable) and score_target(float(said)) == example.target
        return {"exact": {"parsed": said if readable else None, "correct": correct}}

    def summarise(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Add the official metric of each scorer, and the accuracy on each evaluated split.

        ``<metric>_<scorer>`` for every scorer, ``<metric>`` for the first; ``accuracy_matched``
        and ``accuracy_mismatched`` for MNLI.
        """
        metrics = super().summarise(rows)
        if self.subtask.metric is not None:
            gold = [row["reference"] for row in rows]
            for scorer in reversed(self.scorers):
                found = official_metrics(
                    self.subtask.metric,
                    gold,
                    [row["scores"][scorer]["parsed"] for row in rows],
                    labels=self.labels,
                    score_range=self.score_range,
                )
                metrics |= {f"{name}_{scorer}": value for name, value in found.items()}
            # The loop ended with the first scorer, which the plain names repeat.
            metrics |= found
        parts: dict[str, list[bool]] = {}
        for row in rows:
            part = row["row_id"].split("/")[0].removeprefix("validation_")
            parts.setdefault(part, []).append(row["scores"][self.scorers[0]]["correct"])
        if parts.keys() & {"matched", "mismatched"}:
            metrics |= {f"accuracy_{part}": sum(v) / len(v) for part, v in parts.items()}
        return metrics

    def _load_test(self) -> list[Example]:
        examples, self.sources["test"] = [], {}
        self.counts["test"] = {"read": 0, "kept": 0}
        for source in self._evaluated():
            read = self._read(source)
            self.sources["test"][source] = read.source
            for name, count in {"read": len(read.rows), **_left_out(read)}.items():
                self.counts["test"][name] = self.counts["test"].get(name, 0) + count
            examples += [self._example(row, source, i) for i, row in enumerate(read.rows)]
        self.counts["test"]["kept"] = len(examples)
        return examples

    def _evaluated(self) -> list[str]:
        """The source splits that are evaluated on; of further local ones those that are there."""
        if self._folder is None:
            return list(self.subtask.layouts[0].evaluation)
        first, *others = self._layout().evaluation.items()
        return [first[0], *(split for split, stems in others if self._are_there(stems))]

    def _read(self, source: str) -> Rows:
        """Read a source split, its columns under the names that the templates use."""
        if self._folder is None:
            read = read_hub(self.hub_id, self.subtask.hub_config, source, self._revision)
            return Rows([self._renamed(row) for row in read.rows], read.source)
        layout = self._layout()
        stems = layout.train if source == "train" else layout.evaluation[source]
        parts = [
            read_file(
                file,
                columns=layout.columns if file.suffix == ".tsv" else None,
                leave_out_malformed=self.subtask.leave_out_malformed,
            )
            for stem in stems
            for file in self._files(stem) or [self._missing(stem, source)]
        ]
        rows = [self._renamed(row) for part in parts for row in part.rows]
        if len(parts) == 1:
            return Rows(rows, parts[0].source)
        left_out = sum(part.source.get("left_out", 0) for part in parts)
        return Rows(rows, {"files": [part.source for part in parts], "left_out": left_out})

    def _layout(self) -> Layout:
        if not self._folder.is_dir():
            said = "is a file" if self._folder.is_file() else "does not exist"
            raise InputError(
                f"dataset.path={self._folder} {said}; expected a folder with the files of "
                f"{self.subtask.name}, such as train.tsv and dev.tsv"
            )

        def completeness(layout: Layout) -> int:
            tested = self._are_there(next(iter(layout.evaluation.values())))
            return 2 * tested + self._are_there(layout.train)

        # max returns the first of equals.
        return max(self.subtask.layouts, key=completeness)

    def _are_there(self, stems: Sequence[str]) -> bool:
        return all(self._files(stem) for stem in stems)

    def _files(self, stem: str) -> list[Path]:
        """All files of this name, in the first format in which there are any."""
        # The hub's parquet files are numbered shards.
        names = [*(f"{stem}{suffix}" for suffix in (*SUFFIXES, ".txt")), f"{stem}-*-of-*.parquet"]
        matches = (sorted(self._folder.glob(name)) for name in names)
        return next((files for files in matches if files), [])

    def _missing(self, stem: str, split: str) -> Path:
        raise InputError(
            f"{self._folder}: no {stem} ({', '.join(SUFFIXES)}) for the {split} split of "
            f"{self.subtask.name}; {what_is_in(self._folder)}"
        )

    def _renamed(self, row: Row) -> Row:
        """Return the text columns and the label under their names on the hub."""
        fields = {}
        for column, others in self.subtask.columns.items():
            value = row.fields.get(next((n for n in (column, *others) if n in row.fields), column))
            if not isinstance(value, str):
                raise InputError(
                    f"{row.place}: {self.subtask.name} needs a text in '{column}' (columns here: "
                    f"{', '.join(row.fields) or 'none'})"
                )
            fields[column] = value
        name = next((n for n in self.subtask.label_columns if n in row.fields), None)
        if name is None:
            raise InputError(
                f"{row.place}: {self.subtask.name} needs a label in "
                f"'{' or '.join(self.subtask.label_columns)}' (columns here: "
                f"{', '.join(row.fields)}); GLUE's own test files have none"
            )
        fields["label"] = row.fields[name]
        return Row(row.place, fields)

    def _example(self, row: Row, source: str, index: int) -> Example:
        if self.labels:
            target = reference = self.labels[self._class_index(row)]
        else:
            score = self._score(row)
            target, reference = score_target(score), f"{score:.3f}"
        fields = {column: row.fields[column] for column in self.subtask.columns}
        return make_example(
            source,
            index,
            self.template.prompt.format(**fields),
            self.template.target.format(label=target),
            reference,
            self.labels,
            tuple(text.format(**fields) for text in self.subtask.texts),
        )

    def _class_index(self, row: Row) -> int:
        """Read a label: a class index, as number or digits, a truth value, or a word."""
        given = row.fields["label"]
        word = str(given).strip()
        if word.isdecimal() and int(word) < len(self.labels):
            return int(word)
        if isinstance(given, bool):
            return int(given)
        for words in (self.subtask.source_labels, self.labels):
            if word in words:
                return words.index(word)
        hidden = ": the labels of the test split are hidden" if word == "-1" else ""
        raise InputError(
            f"{row.place}: label {given!r}{hidden}; expected "
            f"{', '.join(self.subtask.source_labels or self.labels)}, or 0 to "
            f"{len(self.labels) - 1}"
        )

    def _score(self, row: Row) -> float:
        low, high = self.score_range
        try:
            score = float(row.fields["label"])
        except (TypeError, ValueError):
            score = float("nan")
        if not low <= score <= high:
            raise InputError(
                f"{row.place}: score {row.fields['label']!r}; expected a number from {low:g} to "
                f"{high:g}"
            )
        return score


def score_target(score: float) -> str:
    """Round to the nearest fifth, as T5 writes STS-B's scores: 3.75 becomes ``3.8``."""
    return f"{round(score * 5) / 5:.1f}"


def task_class(subtask: Subtask, hub_id: str, source: str) -> type[LabelledText]:
    """Make the class of one benchmark of a family; ``source`` says whose prompt it follows."""
    return type(
        subtask.name,
        (LabelledText,),
        {
            "__doc__": f"{subtask.name}; prompt and label words of {source}.",
            "__module__": __name__,
            "name": subtask.name,
            "subtask": subtask,
            "hub_id": hub_id,
            "template": Template(subtask.prompt, "{label}", subtask.texts),
            "labels": subtask.labels,
            "score_range": subtask.score_range,
            "scorers": ("exact", "choice") if subtask.labels else ("exact",),
            "primary_metric": subtask.primary_metric,
        },
    )


def _left_out(read: Rows) -> dict[str, int]:
    left_out = read.source.get("left_out", 0)
    return {"lines with another number of columns": left_out} if left_out else {}

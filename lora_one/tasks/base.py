"""What every benchmark is: rows of prompt, target and reference, and a way to score a reply."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, ClassVar, Literal, TypedDict

from lora_one.errors import InputError, nearest

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

CountTokens = Callable[[list[str]], list[int]]
"""Number of tokens of each text, special tokens included (``encoding.token_counter``)."""


@dataclass(frozen=True)
class Example:
    """One row of a benchmark, as a model sees it.

    Attributes:
        row_id: Where the row stands in its source and what it says, ``train/17-3f9a0c1b``: the
            split and 0-based index in the source, and the first 8 hexadecimal digits of a hash of
            prompt and target. A row that moves or changes has another id.
        prompt: The text given to the model, template applied.
        target: The text the model learns to reply.
        reference: The gold answer as the source writes it, or None where there is none.
        choices: The targets that come into question, ``target`` among them, where the benchmark
            is a choice; their probabilities are compared besides reading the reply.
        texts: What a model with a classification head reads instead of the prompt: one text, or
            the two of a pair. Empty where the benchmark is no classification.
    """

    row_id: str
    prompt: str
    target: str
    reference: str | None
    choices: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()


class Verdict(TypedDict):
    """What one scorer says about one reply; an answer that cannot be read is None."""

    parsed: str | None
    correct: bool


@dataclass(frozen=True)
class Template:
    """The texts a row is put into, with ``str.format`` fields named as the source's columns.

    Attributes:
        prompt: Of ``Example.prompt``.
        target: Of ``Example.target``.
        texts: Of ``Example.texts``, which a classification head reads.
    """

    prompt: str
    target: str
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Origin:
    """Where the rows come from, and whether a machine without network can read them.

    Attributes:
        kind: ``embedded`` (in this repository), ``local`` (``dataset.path``) or ``hub``.
        location: Folder, file or hub id.
        available_offline: The files exist here, or the hub cache of this machine has them whole.
    """

    kind: Literal["embedded", "local", "hub"]
    location: str
    available_offline: bool


class Task(ABC):
    """A benchmark. Subclasses say how rows are read, formatted and scored.

    Attributes:
        name: Its name in the registry and in ``dataset=``.
        template: Prompt and target templates; recorded in the run.
        scorers: Names of the verdicts that ``score`` gives, the primary one first.
        primary_metric: The key of ``summarise`` that the comparison table shows.
        stop_strings: A reply ends where one of these begins.
        executes_code: Scoring runs the replies as programs, which needs the user's consent.
        labels: The targets by class index, where the same few come into question for every row: a
            model with a classification head has one output for each.
        score_range: Where the answer is a number instead, its ends: such a head has one output.
        counts: Filled by ``load``: per split, the rows read, kept and left out, and why.
        sources: Filled by ``load``: per split, the file and its SHA-256, or hub id and revision.
        prompt_room: Longest test prompt, in tokens, that leaves the model room for a whole reply;
            set before ``load("test")`` by whoever knows the model, and heeded by a task that can
            shorten its prompts. None is no limit.
    """

    name: ClassVar[str]
    template: ClassVar[Template]
    scorers: ClassVar[tuple[str, ...]]
    primary_metric: ClassVar[str] = "accuracy"
    stop_strings: ClassVar[tuple[str, ...]] = ()
    executes_code: ClassVar[bool] = False
    labels: ClassVar[tuple[str, ...]] = ()
    score_range: ClassVar[tuple[float, float] | None] = None

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = {}
        self.sources: dict[str, dict[str, Any]] = {}
        self.prompt_room: int | None = None

    @abstractmethod
    def load(self, split: Split, *, count_tokens: CountTokens | None = None) -> list[Example]:
        """Read one split.

        Args:
            split: ``train``, ``validation`` or ``test``; the three share no row.
            count_tokens: Counts tokens; needed only by a task that selects rows by length.

        Raises:
            InputError: No such split, a missing, empty or malformed file, a row without an answer,
                or a hub that cannot be reached.
        """

    @abstractmethod
    def origin(self) -> Origin:
        """Say where ``load`` would read from, without reading."""

    @abstractmethod
    def score(self, reply: str, example: Example) -> dict[str, Verdict]:
        """Judge one raw reply; one verdict per name in ``scorers``."""

    def judge(
        self, replies: Sequence[str], examples: Sequence[Example]
    ) -> list[dict[str, Verdict]]:
        """Judge many replies, in order; a task whose judging is slow does it side by side."""
        return [self.score(reply, e) for reply, e in zip(replies, examples, strict=True)]

    def summarise(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Turn per-row verdicts into metrics.

        Args:
            rows: Mappings whose ``scores`` is what ``score`` returned, such as the lines of
                ``predictions.jsonl``; a resumed evaluation can pass old and new rows together.

        Returns:
            ``n``; ``accuracy_<scorer>`` and ``unparsed_<scorer>`` for every scorer; ``accuracy``
            and ``unparsed`` repeat those of the first scorer. A reply that cannot be read counts
            as wrong. All rates are fractions of ``n``.

        Raises:
            InputError: There is no row: an accuracy over nothing is not a number.
        """
        if not rows:
            raise InputError(f"{self.name}: there is no scored row to summarise")
        metrics: dict[str, float] = {"n": len(rows)}
        for scorer in self.scorers:
            verdicts = [row["scores"][scorer] for row in rows]
            metrics[f"accuracy_{scorer}"] = sum(v["correct"] for v in verdicts) / len(rows)
            metrics[f"unparsed_{scorer}"] = sum(v["parsed"] is None for v in verdicts) / len(rows)
        metrics["accuracy"] = metrics[f"accuracy_{self.scorers[0]}"]
        metrics["unparsed"] = metrics[f"unparsed_{self.scorers[0]}"]
        return metrics


def check_split(split: str) -> None:
    """Raise InputError unless ``split`` is one of train, validation and test."""
    if split not in SPLITS:
        raise InputError(
            f"unknown split '{split}'; valid: {', '.join(SPLITS)}.{nearest(split, SPLITS)}"
        )


def group_accuracies(
    rows: Sequence[Mapping[str, Any]], scorer: str, group: Callable[[Mapping[str, Any]], str]
) -> dict[str, float]:
    """Return ``accuracy_<group>`` by one scorer for every group that has a row."""
    verdicts: dict[str, list[bool]] = {}
    for row in rows:
        verdicts.setdefault(group(row), []).append(row["scores"][scorer]["correct"])
    return {f"accuracy_{name}": sum(v) / len(v) for name, v in sorted(verdicts.items())}


def make_example(
    split: str,
    index: int,
    prompt: str,
    target: str,
    reference: str | None,
    choices: tuple[str, ...] = (),
    texts: tuple[str, ...] = (),
) -> Example:
    """Build an Example; ``split`` and ``index`` say where the row stands in its source."""
    # The unit separator keeps ("ab", "c") and ("a", "bc") apart.
    digest = sha256(f"{prompt}\x1f{target}".encode()).hexdigest()[:8]
    return Example(f"{split}/{index}-{digest}", prompt, target, reference, choices, texts)

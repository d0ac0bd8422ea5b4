"""Which rows of one source train and which validate; no question is on both sides."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from random import Random

from lora_one.errors import InputError
from lora_one.tasks.base import CountTokens, Example
from lora_one.tasks.rows import Row

# Texts tokenised at a time: enough for the tokenizer's batching, small beside 395,000 rows.
_CHUNK = 2000

SHARED = "prompt also in train"


@dataclass(frozen=True)
class Selection:
    """Rows chosen from one source.

    Attributes:
        train: Rows to learn from, in order.
        validation: Rows for the validation loss; none has the prompt of a training row.
        counts: Rows looked at (``read``), left out by reason, and ``SHARED``: rows left out of
            validation because training has their prompt.
    """

    train: list[Example]
    validation: list[Example]
    counts: dict[str, int]

    def counts_of(self, split: str) -> dict[str, int]:
        """Return the counts of one split, ``kept`` included."""
        return {**self.counts, "kept": len(getattr(self, split))}

    def nothing_for(self, split: str) -> str:
        """Say why a split has no row, and what to do."""
        below = max(len(self.train), 1)
        return (
            f"no row is left for {split}: training takes {len(self.train)} (left out: "
            f"{counted(self.counts)}); "
            + (f"set dataset.train_rows below {below}" if below > 1 else "give more rows")
        )


def counted(counts: Mapping[str, int]) -> str:
    """Write ``Selection.counts`` in words."""
    left_out = [f"{n} for '{reason}'" for reason, n in counts.items() if n and reason != "read"]
    return f"{', '.join(left_out) or 'none'}; of {counts['read']} rows read"


def select_in_order(
    rows: Sequence[tuple[int, Row]],
    example_of: Callable[[Row, int], Example | str],
    *,
    max_tokens: int | None,
    count_tokens: CountTokens | None,
    train_rows: int | None,
    validation_rows: int,
) -> Selection:
    """Take the first ``train_rows`` rows that pass a filter, and validate on the next ones.

    So the published loaders of LoRA-GA and LoRA-One select. A validation row whose prompt is that
    of a training row is left out, which theirs do not do; training rows are theirs.

    Args:
        rows: Pairs of position in the source and row, in the order to take them.
        example_of: Gives the example of a row and its position, or says why it is left out.
        max_tokens: Rows with this many tokens or more, prompt and target joined by a space, are
            left out; None keeps every length.
        count_tokens: Counts tokens; needed with ``max_tokens``.
        train_rows: Rows for training, at most; None is all.
        validation_rows: Rows looked at for validation, at most.

    Raises:
        InputError: ``max_tokens`` without ``count_tokens``.
    """
    if max_tokens is not None and count_tokens is None:
        raise InputError(
            f"dataset.max_tokens={max_tokens} selects rows by length, which needs a "
            "tokenizer: pass count_tokens=, or max_tokens=None to keep every length"
        )
    wanted = None if train_rows is None else train_rows + validation_rows
    kept: list[Example] = []
    counts: dict[str, int] = {"read": 0}
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        found = [example_of(row, index) for index, row in chunk]
        counts["read"] += len(chunk)
        for reason in (reason for reason in found if isinstance(reason, str)):
            counts[reason] = counts.get(reason, 0) + 1
        examples = [example for example in found if isinstance(example, Example)]
        short = _below(examples, max_tokens, count_tokens)
        if max_tokens is not None:
            reason = f"{max_tokens} tokens or more"
            counts[reason] = counts.get(reason, 0) + len(examples) - len(short)
        kept += short
        if wanted is not None and len(kept) >= wanted:
            break
    train = kept[:train_rows]
    return _without_shared(train, kept[len(train) : wanted], counts)


def select_by_group(
    examples: Sequence[Example],
    groups: Sequence[str],
    *,
    train_rows: int | None,
    validation_rows: int,
    seed: int,
    counts: dict[str, int],
) -> Selection:
    """Validate on whole groups of rows, so that no group is on both sides.

    Groups are held out in the order of a seeded hash of their name, as long as they have
    ``validation_rows`` rows together at most; which they are does not depend on the rows' order.

    Args:
        examples: The rows, in order.
        groups: The group of each, such as the question that several rows rewrite.
        train_rows: The first so many of the other rows train; None is all.
        validation_rows: Rows for validation, at most.
        seed: Seed of the choice of groups.
        counts: Rows left out so far, by reason.
    """
    sizes: dict[str, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    held_out: set[str] = set()
    rows = 0
    for group in sorted(sizes, key=lambda name: sha256(f"{seed}\x1f{name}".encode()).digest()):
        if rows + sizes[group] > validation_rows:
            break
        held_out.add(group)
        rows += sizes[group]
    pairs = list(zip(examples, groups, strict=True))
    train = [example for example, group in pairs if group not in held_out]
    validation = [example for example, group in pairs if group in held_out]
    return _without_shared(train[:train_rows], validation, counts)


def in_order(rows: Iterable[Row], order: str, seed: int) -> list[tuple[int, Row]]:
    """Pair rows with their positions, in file order (``published``) or ``shuffled`` by a seed."""
    indexed = list(enumerate(rows))
    if order == "shuffled":
        Random(seed).shuffle(indexed)
    return indexed


def _below(
    examples: list[Example], max_tokens: int | None, count_tokens: CountTokens | None
) -> list[Example]:
    if max_tokens is None or count_tokens is None or not examples:
        return examples
    # The published filters count prompt and target joined by a space.
    lengths = count_tokens([f"{example.prompt} {example.target}" for example in examples])
    return [e for e, length in zip(examples, lengths, strict=True) if length < max_tokens]


def _without_shared(
    train: list[Example], validation: list[Example], counts: dict[str, int]
) -> Selection:
    learnt = {example.prompt for example in train}
    unseen = [example for example in validation if example.prompt not in learnt]
    return Selection(train, unseen, {**counts, SHARED: len(validation) - len(unseen)})

"""MATH (Hendrycks et al. 2021, arXiv:2103.03874): competition problems, 7,500 train, 5,000 test."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from lora_one.errors import InputError, nearest
from lora_one.tasks.answers import NEXT_QUESTION
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
from lora_one.tasks.math_answers import (
    last_boxed,
    plain_constants,
    same_notation,
    same_spelling,
    stated_answer,
)
from lora_one.tasks.math_equivalence import Compared, Equivalence, require_math_verify
from lora_one.tasks.reads import note_file
from lora_one.tasks.rows import (
    OWN_VALIDATION,
    Row,
    Rows,
    as_row,
    find_split_file,
    has_split_file,
    hold_out,
    hub_cache_holds,
    read_file,
    read_hub,
)

HUB_ID = "EleutherAI/hendrycks_math"
REVISION = "21a5633873b6a120296cce3e2df9d5550074f4a3"
HUB_ID_500 = "HuggingFaceH4/MATH-500"
REVISION_500 = "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"
SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
TEST_SETS = ("full", "math500")
ROWS_500 = 500


class MathVerdict(Verdict, total=False):
    """A verdict that says where a comparison was left undecided, and so counts as unequal.

    Attributes:
        compared: ``timeout`` or ``crashed`` (``lora_one.tasks.math_equivalence``), or absent.
    """

    compared: Compared


class HendrycksMath(Task):
    r"""MATH: a solution in LaTeX whose last ``\boxed{...}`` is the answer.

    The prompt is that of MetaMathQA here, so that an adapter trained on it is asked as it learnt.
    ``math_verify`` compares the stated answers as mathematics, ``strict`` compares their spellings
    (``lora_one.tasks.math_answers`` says what states an answer, and what spells the same).
    math-verify ignores units in ``\text{}`` and the base of a numeral: to it 10 am is 10 pm, and
    ``11_2`` is ``11_3``, as to its other users.

    A folder holds ``test.jsonl`` or ``test.json``, or a folder ``test`` with one file per subject
    or, as in the original archive, one folder per subject and one ``.json`` object per problem;
    ``train`` the same way. Columns: ``problem``, ``solution``, ``level`` and ``type`` (or, as in
    MATH-500, ``subject``).

    MATH has no validation split: it is a slice of the training rows, chosen by a seeded hash of
    the problem, unless the folder has its own ``validation``.

    Args:
        path: Folder with local files; None reads the hub, one configuration per subject.
        test_set: ``full`` (5,000 problems) or ``math500`` (the 500 of Lightman et al. 2023); with
            ``path``, ``math500`` says that the test file there holds those 500.
        held_out_rows: Training problems held out for validation.
        split_seed: Seed of that choice.
        revision: Commit, tag or branch of the hub dataset; None is the pinned commit.
    """

    name = "math"
    template = Template(prompt="Q: {problem}\nA: ", target="{solution}")
    scorers = ("math_verify", "strict")
    stop_strings = (NEXT_QUESTION,)

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        test_set: Literal["full", "math500"] = "full",
        held_out_rows: int = 500,
        split_seed: int = 0,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        if test_set not in TEST_SETS:
            raise InputError(
                f"dataset.test_set='{test_set}'; valid: {', '.join(TEST_SETS)}."
                f"{nearest(test_set, TEST_SETS)}"
            )
        self._folder = None if path is None else Path(path)
        self._test_set = test_set
        self._held_out_rows = held_out_rows
        self._split_seed = split_seed
        self._revision = revision
        self._equivalence: Equivalence | None = None

    def origin(self) -> Origin:
        """Name the folder or the hub id."""
        if self._folder is not None:
            return Origin("local", str(self._folder), self._folder.is_dir())
        revision = self._revision or REVISION
        ready = all(
            hub_cache_holds(HUB_ID, subject, split, revision)
            for subject in SUBJECTS
            for split in ("train", "test")
        )
        if self._test_set == "full":
            return Origin("hub", HUB_ID, ready)
        test_ready = hub_cache_holds(HUB_ID_500, None, "test", self._revision or REVISION_500)
        return Origin("hub", HUB_ID_500, ready and test_ready)

    def load(self, split: Split, *, count_tokens: CountTokens | None = None) -> list[Example]:
        """Read one split; every row is used in exactly one of them."""
        check_split(split)
        if split == "test":
            require_math_verify()  # now, and not after the training
        own = split == "test" or self._has("validation")
        source_split = split if own else "train"
        read = self._read(source_split)
        indices = list(range(len(read.rows)))
        if not own:
            kept, held_out = hold_out(
                read.rows, self._held_out_rows, self._split_seed, "problem", OWN_VALIDATION
            )
            indices = kept if split == "train" else held_out
        local_500 = self._folder is not None and self._test_set == "math500"
        if split == "test" and local_500 and len(indices) != ROWS_500:
            raise InputError(
                f"dataset.test_set=math500, but the test in {self._folder} has "
                f"{len(indices):,} rows, not {ROWS_500}: give the folder of MATH-500's test.jsonl "
                "as dataset.path, or dataset.test_set=full"
            )
        self.sources[split] = read.source
        self.counts[split] = {"read": len(read.rows), "kept": len(indices)}
        return [self._example(read.rows[index], source_split, index) for index in indices]

    def score(self, reply: str, example: Example) -> dict[str, Verdict]:
        """Compare the answer that a reply states with the gold one, in two ways."""
        return self.judge([reply], [example])[0]

    def judge(
        self, replies: Sequence[str], examples: Sequence[Example]
    ) -> list[dict[str, Verdict]]:
        """Judge many replies; comparisons that are not settled by spelling run side by side."""
        if self._equivalence is None:
            self._equivalence = Equivalence()
        answers = [stated_answer(reply) for reply in replies]
        pairs = list(zip(answers, map(_gold, examples), strict=True))
        open_cases = [
            (plain_constants(gold), plain_constants(answer))
            for answer, gold in pairs
            if answer is not None and not same_notation(answer, gold)
        ]
        compared = iter(self._equivalence.compare(open_cases))
        return [
            {
                "math_verify": _math_verdict(answer, gold, compared),
                "strict": {
                    "parsed": answer,
                    "correct": answer is not None and same_spelling(answer, gold),
                },
            }
            for answer, gold in pairs
        ]

    def summarise(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Add the primary accuracy by subject and by level (``unknown`` where MATH has none).

        ``undecided_timeout`` and ``undecided_crashed`` count comparisons that were not finished,
        where there are any; they count as wrong in the accuracy.
        """
        reasons = [row["scores"]["math_verify"].get("compared") for row in rows]
        return (
            super().summarise(rows)
            | {f"undecided_{why}": n for why, n in sorted(Counter(filter(None, reasons)).items())}
            | group_accuracies(rows, self.scorers[0], lambda row: f"subject_{_part(row, 1)}")
            | group_accuracies(rows, self.scorers[0], lambda row: f"level_{_part(row, 2)}")
        )

    def _example(self, row: Row, split: str, index: int) -> Example:
        solution = row.text("solution")
        answer = last_boxed(solution)
        if answer is None:
            raise InputError(
                f"{row.place}: the solution must hold its answer in \\boxed{{...}}, but ends in "
                f"{solution.strip()[-40:]!r}"
            )
        place = f"{split}/{_subject(row)}/{_level(row)}"
        prompt = self.template.prompt.format(problem=row.text("problem"))
        return make_example(
            place, index, prompt, self.template.target.format(solution=solution), answer
        )

    def _has(self, split: str) -> bool:
        folder = self._folder
        return folder is not None and (has_split_file(folder, split) or (folder / split).is_dir())

    def _read(self, split: str) -> Rows:
        if self._folder is None:
            if split == "test" and self._test_set == "math500":
                return read_hub(HUB_ID_500, None, "test", self._revision or REVISION_500)
            revision = self._revision or REVISION
            parts = [read_hub(HUB_ID, subject, split, revision) for subject in SUBJECTS]
            return _joined(parts, {**parts[0].source, "config": ", ".join(SUBJECTS)})
        folder = self._folder / split
        if has_split_file(self._folder, split) or not folder.is_dir():
            return read_file(find_split_file(self._folder, split))
        files = sorted(folder.rglob("*.json*"), key=_numerically)
        if not files:
            raise InputError(f"{folder}: no .json or .jsonl file is in it")
        parts = [_read_problems(file) for file in files]
        rows = [row for part in parts for row in part.rows]
        return _joined(parts, {"folder": str(folder), "sha256_of_rows": _digest(rows)})


def _math_verdict(answer: str | None, gold: str, compared: Iterator[Compared]) -> MathVerdict:
    """Take the next of the comparisons, in the order of ``judge``, where there had to be one."""
    if answer is None or same_notation(answer, gold):
        return {"parsed": answer, "correct": answer is not None}
    result = next(compared)
    verdict: MathVerdict = {"parsed": answer, "correct": result == "equal"}
    if result in ("timeout", "crashed"):
        verdict["compared"] = result
    return verdict


def _gold(example: Example) -> str:
    if example.reference is None:
        raise InputError(f"{example.row_id}: a row without a gold answer cannot be scored")
    return example.reference


def _subject(row: Row) -> str:
    """Return the subject as hub configurations and folders spell it: ``number_theory``."""
    column = "type" if "type" in row.fields else "subject"
    words = re.sub(r"[^a-z]+", " ", row.text(column).lower().replace("&", " and "))
    return "_".join(words.split())


def _level(row: Row) -> str:
    """Return ``1`` to ``5`` from "Level 3" or 3; two problems of MATH have "Level ?"."""
    digits = re.search(r"[1-5]", str(row.fields.get("level", "")))
    return digits[0] if digits else "unknown"


def _part(row: Mapping[str, Any], position: int) -> str:
    return row["row_id"].split("/")[position]


def _read_problems(file: Path) -> Rows:
    """Read a file of rows or, as in the original archive, of one object."""
    raw = file.read_bytes()
    try:
        content = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return read_file(file)  # JSON lines, or an error that it explains
    if not isinstance(content, dict):
        return read_file(file)
    note_file(file, raw)
    return Rows([as_row(str(file), content)], {"file": str(file), "rows": 1})


def _numerically(file: Path) -> tuple[str, int, str]:
    """Sort ``algebra/10.json`` after ``algebra/9.json``."""
    return str(file.parent), int(file.stem) if file.stem.isdigit() else 0, file.name


def _joined(parts: Sequence[Rows], source: dict[str, Any]) -> Rows:
    rows = [row for part in parts for row in part.rows]
    return Rows(rows, {**source, "rows": len(rows)})


def _digest(rows: Sequence[Row]) -> str:
    """Hash the rows of many small files, whatever the files are called."""
    digest = sha256()
    for row in rows:
        digest.update(json.dumps(row.fields, sort_keys=True).encode())
    return digest.hexdigest()

"""MMLU (Hendrycks et al. 2021, arXiv:2009.03300): four-choice questions in 57 subjects."""

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

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
    group_accuracies,
    make_example,
)
from lora_one.tasks.mmlu_subjects import CATEGORIES
from lora_one.tasks.rows import (
    Row,
    Rows,
    find_split_file,
    hub_cache_holds,
    read_file,
    read_hub,
)

HUB_ID = "cais/mmlu"
HUB_CONFIG = "all"
REVISION = "c30699e8356da336a370243923dbaf21066bb9fe"
LETTERS = ("A", "B", "C", "D")
SHOTS = (0, 1, 2, 3, 4, 5)
# Counts prompts that would have been too long with all their shots.
SHORTENED = "prompts shortened to fewer shots"

_COLUMNS = ("question", *LETTERS, "answer")
# The split's folder and file suffix in the original archive, and its name on the hub.
_FOLDERS = {"dev": "dev", "validation": "val", "test": "test"}
# The letter stands alone: "B", "(B)", "B. 4" or "The answer is B", but not "A man".
_OPENING = r"[\s(\[*\"'`]*"
_LETTER = re.compile(
    rf"{_OPENING}(?:the (?:correct )?answer is:?{_OPENING})?([A-D])(?=[.)\]:*\"'`]|\s*(?:\n|$))",
    re.IGNORECASE,
)


class MMLU(Task):
    r"""Multiple choice; a test only, so ``load("train")`` is an error.

    The prompt is that of the authors' evaluation code: "The following are multiple choice questions
    (with answers) about <subject>.", then ``shots`` answered questions of the subject's ``dev``
    split, the question, its choices after "A." to "D.", and "Answer:". The target is a space and
    the letter, as an answered question continues.

    ``choice`` (primary, the standard) takes the most probable of the four letters after "Answer:";
    ``letter`` reads the letter that a generated reply begins with, and guesses none.

    A folder holds, as in the original archive, ``test/<subject>_test.csv``,
    ``val/<subject>_val.csv`` and ``dev/<subject>_dev.csv`` without a header, or one file per split
    (``test``, ``validation``, ``dev``; ``.jsonl``, ``.parquet``, ...) with the hub's columns
    ``question``, ``subject``, ``choices`` and ``answer`` (0 to 3).

    Args:
        path: Folder with local files; None reads ``cais/mmlu``, config ``all``, from the hub.
        shots: Answered questions before each, 0 to 5.
        max_prompt_tokens: A prompt with more tokens, or more than ``prompt_room``, has as many of
            its last answered questions taken away as needed, as the authors do; the rows that this
            touches are counted. None: only where the model's context asks for it.
        revision: Commit, tag or branch of the hub dataset; None is the pinned commit.
    """

    name = "mmlu"
    template = Template(
        prompt=(
            "The following are multiple choice questions (with answers) about {subject}.\n\n"
            "{shots}{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\nAnswer:"
        ),
        target=" {answer}",
    )
    scorers = ("choice", "letter")
    stop_strings = ("\n",)

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        shots: Literal[0, 1, 2, 3, 4, 5] = 0,
        max_prompt_tokens: int | None = 2048,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        if shots not in SHOTS:
            raise InputError(
                f"dataset.shots={shots}; expected 0 to 5: every subject has five answered questions"
            )
        self._folder = None if path is None else Path(path)
        self._shots = shots
        self._max_prompt_tokens = max_prompt_tokens
        self._revision = revision or REVISION

    def origin(self) -> Origin:
        """Name the folder or the hub id."""
        if self._folder is not None:
            return Origin("local", str(self._folder), self._folder.is_dir())
        needed = ("dev", "test") if self._shots else ("test",)
        here = [hub_cache_holds(HUB_ID, HUB_CONFIG, split, self._revision) for split in needed]
        return Origin("hub", HUB_ID, all(here))

    def load(self, split: Split, *, count_tokens: CountTokens | None = None) -> list[Example]:
        """Read ``test`` or ``validation``; ``count_tokens`` is needed for shots under a limit.

        Raises:
            InputError: As ``Task.load``; and for ``train``, which MMLU does not have.
        """
        check_split(split)
        if split == "train":
            raise InputError(
                "MMLU is a test and has no training rows: evaluate with train=none, or train on "
                "another data set and test on this one (dataset=alpaca, dataset=wizard_lm)"
            )
        read = self._read(split)
        shown = self._shown()
        questions = [_question(row) for row in read.rows]
        chosen = self._that_fit(questions, shown, count_tokens)
        self.sources[split] = read.source
        self.counts[split] = {"read": len(read.rows), "kept": len(read.rows)}
        positions: dict[str, int] = {}
        examples, shortened = [], 0
        for question, shots in zip(questions, chosen, strict=True):
            subject = question["subject"]
            shortened += len(shots) < len(shown.get(subject, ()))
            index = positions[subject] = positions.get(subject, -1) + 1
            examples.append(
                make_example(
                    f"{split}/{subject}",
                    index,
                    self._prompt(question, shots),
                    self.template.target.format(answer=question["answer"]),
                    question["answer"],
                    tuple(self.template.target.format(answer=letter) for letter in LETTERS),
                )
            )
        if self._shots:
            self.counts[split][SHORTENED] = shortened
        return examples

    def score(self, reply: str, example: Example) -> dict[str, Verdict]:
        """Read the letter that the reply begins with; ``choice`` is scored with the model."""
        found = _LETTER.match(reply)
        letter = found[1].upper() if found else None
        return {"letter": {"parsed": letter, "correct": letter == example.reference}}

    def summarise(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Add the primary accuracy by subject and category, and its mean over the subjects.

        ``accuracy`` is over questions (micro); ``accuracy_macro`` gives each subject one vote.
        """
        by_subject = group_accuracies(rows, self.scorers[0], lambda row: f"subject_{_of(row)}")
        by_category = group_accuracies(
            rows, self.scorers[0], lambda row: f"category_{CATEGORIES.get(_of(row), 'unknown')}"
        )
        macro = {"accuracy_macro": sum(by_subject.values()) / len(by_subject)} if rows else {}
        return super().summarise(rows) | macro | by_category | by_subject

    def _prompt(self, question: Mapping[str, str], shots: Sequence[str]) -> str:
        fields = {**question, "subject": question["subject"].replace("_", " ")}
        return self.template.prompt.format(**fields, shots="".join(shots))

    def _that_fit(
        self,
        questions: Sequence[Mapping[str, str]],
        shown: Mapping[str, Sequence[str]],
        count_tokens: CountTokens | None,
    ) -> list[Sequence[str]]:
        """Return the shots of each question.

        A question with its header, and each shot, is tokenised once, and the length of a prompt is
        taken to be their sum. It is an upper bound: one token is added for every border, since a
        tokenizer may cut there otherwise than within a text (GPT-2's cuts two line ends apart
        before a letter), and the special tokens count once.
        """
        limits = [n for n in (self._max_prompt_tokens, self.prompt_room) if n is not None]
        if not self._shots or not limits:
            return [shown.get(question["subject"], ()) for question in questions]
        limit = min(limits)
        if count_tokens is None:
            raise InputError(
                f"prompts of at most {limit} tokens (dataset.max_prompt_tokens, or the model's "
                "context) lose answered questions by length, which needs a tokenizer: pass "
                "count_tokens=, or max_prompt_tokens=None"
            )
        (special,) = count_tokens([""])
        # Of the first so many shots of a subject: the tokens that they add.
        added = {
            subject: list(accumulate(n - special + 1 for n in count_tokens(shots)))
            for subject, shots in shown.items()
        }
        bare = count_tokens([self._prompt(question, ()) for question in questions])
        chosen = []
        for question, length in zip(questions, bare, strict=True):
            subject = question["subject"]
            fitting = sum(length + more <= limit for more in added.get(subject, ()))
            chosen.append(shown.get(subject, ())[:fitting])
        return chosen

    def _shown(self) -> dict[str, list[str]]:
        """Return the shots of each subject: its first questions of ``dev``, answered."""
        shown: dict[str, list[str]] = {}
        if not self._shots:
            return shown
        form = self.template.prompt.split("{shots}")[1] + self.template.target + "\n\n"
        for row in self._read("dev").rows:
            question = _question(row)
            shown.setdefault(question["subject"], []).append(form.format(**question))
        return {subject: texts[: self._shots] for subject, texts in shown.items()}

    def _read(self, split: str) -> Rows:
        if self._folder is None:
            return read_hub(HUB_ID, HUB_CONFIG, split, self._revision)
        suffix = _FOLDERS[split]
        files = sorted((self._folder / suffix).glob(f"*_{suffix}.csv"))
        if not files:
            return read_file(find_split_file(self._folder, split))
        rows, digests = [], {}
        for file in files:
            read = read_file(file, columns=_COLUMNS)
            subject = file.stem.removesuffix(f"_{suffix}")
            rows += [Row(row.place, {**row.fields, "subject": subject}) for row in read.rows]
            digests[file.name] = read.source["sha256"]
        source = {"folder": str(self._folder / suffix), "sha256": digests, "rows": len(rows)}
        return Rows(rows, source)


def _question(row: Row) -> dict[str, str]:
    """Return question, subject, A to D and the answer's letter, from either schema."""
    fields = row.fields
    if "choices" in fields:
        choices, number = fields["choices"], fields.get("answer")
        answer = LETTERS[number] if number in range(4) else None
        texts = list(choices) if isinstance(choices, list | tuple) else []
    else:
        texts = [fields.get(letter) for letter in LETTERS]
        answer = fields.get("answer") if fields.get("answer") in LETTERS else None
    if len(texts) != 4 or not all(isinstance(text, str) for text in texts) or answer is None:
        raise InputError(
            f"{row.place}: a row needs four choices and an answer among them (A to D, or 0 to 3 "
            f"beside 'choices'); here: choices {texts!r}, answer {fields.get('answer')!r}"
        )
    subject = row.text("subject").replace(" ", "_")
    return {
        "question": row.text("question").strip(),
        "subject": subject,
        "answer": answer,
        **dict(zip(LETTERS, texts, strict=True)),
    }


def _of(row: Mapping[str, Any]) -> str:
    return row["row_id"].split("/")[1]

"""What the grade-school word problems share: prompt, gold answer, scorers. Subclasses find rows."""

import re
from fractions import Fraction

from lora_one.errors import InputError
from lora_one.tasks import answers
from lora_one.tasks.base import Example, Task, Template, Verdict, make_example
from lora_one.tasks.numerals import format_number
from lora_one.tasks.rows import Row

_CALCULATOR = re.compile(r"<<[^<>]*>>")


class GradeSchoolTask(Task):
    r"""Word problems answered by a chain of thought whose last line is ``#### n``.

    The prompt is that of the published LoRA-GA and LoRA-One runs, ``"Q: {question}\nA: "``. The
    primary scorer is ``strict`` (see ``lora_one.tasks.answers``).
    """

    template = Template(prompt="Q: {question}\nA: ", target="{answer}")
    scorers = ("strict", "flexible", "official")
    stop_strings = (answers.NEXT_QUESTION,)

    def score(self, reply: str, example: Example) -> dict[str, Verdict]:
        """Compare the number in the reply with the gold number, read in three ways."""
        if example.reference is None:
            raise InputError(f"{example.row_id}: a row without a gold answer cannot be scored")
        gold = answers.strict_answer(f"#### {example.reference}")
        official_gold = answers.official_answer(f"#### {example.reference}")
        return {
            "strict": _verdict(answers.strict_answer(reply), gold),
            "flexible": _verdict(answers.flexible_answer(reply), gold),
            "official": _verdict(answers.official_answer(reply), official_gold),
        }

    def example_from_row(
        self, row: Row, split: str, index: int, *, strip_calculator: bool = False
    ) -> Example:
        """Format a row with the columns ``question`` and ``answer``.

        Args:
            row: The source row; its place is named in errors.
            split: Split in the source, for the row id.
            index: 0-based position in the source, for the row id.
            strip_calculator: Remove GSM8K's ``<<48/2=24>>`` calculator annotations.

        Raises:
            InputError: No question, no answer, or no number after the answer's last ``####``.
        """
        question, answer = row.text("question"), row.text("answer")
        reference = gold_answer(row, answer)
        if strip_calculator:
            answer = _CALCULATOR.sub("", answer)
        prompt = self.template.prompt.format(question=question)
        return make_example(
            split, index, prompt, self.template.target.format(answer=answer), reference
        )


def gold_answer(row: Row, answer: str) -> str:
    """Return what follows the last ``####`` of a gold solution, after checking it is a number."""
    _, marker, reference = answer.rpartition("####")
    if not marker or answers.strict_answer(f"#### {reference}") is None:
        raise InputError(
            f"{row.place}: the answer must end in a line '#### <number>', but ends in "
            f"{answer.strip()[-40:]!r}"
        )
    return reference.strip()


def _verdict(answer: Fraction | None, gold: Fraction | None) -> Verdict:
    parsed = None if answer is None else format_number(answer)
    return {"parsed": parsed, "correct": answer is not None and answer == gold}

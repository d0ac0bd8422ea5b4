r"""Read the numerical answer out of a GSM8K-style reply. Pure text, exact arithmetic.

Three readings, side by side, because published GSM8K numbers differ by how the reply is read:

- ``strict``: the number right after the last ``####``; only where there is no ``####``, the number
  right after the last "The answer is" (any case).
- ``flexible``: as strict; where that finds nothing, the last number in the reply.
- ``official``: what the released LoRA-GA and LoRA-One evaluation reads, the digits after the first
  ``####`` (pattern ``####\s*(\d+)``), applied to reply and gold answer alike. It reads 1,234 as
  1, 18.5 as 18, and no negative number. One departure: the released code turns a reply without an
  answer into 0; here it stays None.

All three look only at the part before the first ``"\nQ:"``: a base model that has answered often
goes on to invent the next question, whose answer is not this one's.

How a number may be written is said in ``lora_one.tasks.numerals``. Values are
``fractions.Fraction``, so 18.0 equals 18 and 0.1 + 0.2 equals 0.3.
"""

import re
from fractions import Fraction

from lora_one.tasks.numerals import LONGEST_NUMBER, last_number, number_at_start

NEXT_QUESTION = "\nQ:"

_OFFICIAL = re.compile(r"####\s*(\d+)")


def strict_answer(reply: str) -> Fraction | None:
    """Return the number after the last ``####``, else after the last "The answer is"."""
    reply = first_answer(reply)
    for marker in (r"####+", r"the answer is"):
        # Not reply.lower(): the lower case of some letters is longer, which moves positions.
        ends = [match.end() for match in re.finditer(marker, reply, re.IGNORECASE)]
        if ends:
            return number_at_start(reply[ends[-1] :])
    return None


def flexible_answer(reply: str) -> Fraction | None:
    """Return the strict answer or, where there is none, the last number in the reply."""
    answer = strict_answer(reply)
    return answer if answer is not None else last_number(first_answer(reply))


def official_answer(reply: str) -> Fraction | None:
    """Return the digits after the first ``####``, as the released evaluation code reads them."""
    match = _OFFICIAL.search(first_answer(reply))
    if match is None or len(match[1]) > LONGEST_NUMBER:
        return None
    return Fraction(int(match[1]))


def first_answer(reply: str) -> str:
    """Cut the reply where the model goes on to write another question."""
    return reply.split(NEXT_QUESTION, 1)[0]

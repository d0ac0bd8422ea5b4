r"""Read the final answer out of a solution to a competition problem. Pure text.

``stated_answer`` takes, from the part of a reply before the first ``"\nQ:"`` (where a base model
goes on to invent another question):

1. the content of the last ``\boxed{...}`` or ``\fbox{...}``, braces balanced;
2. else what follows the last "The answer is" (any case, with or without a colon), up to the end of
   the line, one pair of dollar signs and a closing full stop removed;
3. else None: a number somewhere in a reply is no stated answer.

``normalise`` brings two spellings of one LaTeX answer together without doing mathematics. It is
the strict comparison; what is equal as mathematics is for ``lora_one.tasks.math_equivalence``.
"""

import re

from lora_one.tasks.answers import first_answer

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_STATEMENT = re.compile(r"the (?:final )?answer is:?", re.IGNORECASE)
# \boxed5 and \boxed\frac12 box the next token, as TeX reads it.
_BARE = re.compile(r"\\[A-Za-z]+(?:\{[^{}]*\})*|[^\s${}]")

_SPACING = re.compile(r"\\[,!;:> ]|\\q?quad(?![A-Za-z])|~|\s+")
_UNITS = re.compile(r"\\(?:text|mbox|mathrm)\{\s*([A-Za-z .^0-9/]*)\}(?:\^\{?[0-9]\}?)?$")
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf)\{([^{}]*)\}")
_BARE_FRACTION = re.compile(r"\\frac([0-9A-Za-z])([0-9A-Za-z])")
_HALF_BARE_FRACTION = re.compile(r"\\frac(\{[^{}]*\})([0-9A-Za-z])")
_BARE_ROOT = re.compile(r"\\sqrt([0-9A-Za-z])")
_SLASH = re.compile(r"(-?)([0-9]+)/([0-9]+)")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?:\{\})?(?=[0-9]{3}(?![0-9]))")
_SOLVED_FOR = re.compile(r"[A-Za-z]=(?=[^=]+$)")
_TRAILING_ZEROS = re.compile(r"([0-9])\.0+(?![0-9])")


def stated_answer(reply: str) -> str | None:
    """Return the answer that a reply states, as it writes it, or None where it states none."""
    reply = first_answer(reply)
    boxed = last_boxed(reply)
    if boxed is not None:
        return boxed
    ends = [match.end() for match in _STATEMENT.finditer(reply)]
    if not ends:
        return None
    line = reply[ends[-1] :].lstrip(" \t").split("\n", 1)[0].strip()
    line = line.removesuffix(".").strip()
    if len(line) > 1 and line[0] == line[-1] == "$":
        line = line[1:-1].strip()
    return line or None


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}``, or None where none is complete."""
    for match in reversed(list(_BOX.finditer(text))):
        rest = text[match.end() :]
        if rest.startswith("{"):
            content = _balanced(rest)
        else:
            bare = _BARE.match(rest)
            content = bare[0] if bare else None
        if content is not None and content.strip():
            return content.strip()
    return None


def normalise(answer: str) -> str:
    r"""Write a LaTeX answer in one of its spellings.

    Spaces, ``$``, ``\left``, ``\right``, display fractions, degree and percent signs, trailing
    units in ``\text{}``, thousands separators and a leading ``x=`` go; ``\frac12`` and ``1/2``
    become ``\frac{1}{2}``, ``.5`` and ``0.50`` stay decimals (``0.5``, ``0.50``).
    """
    text = answer.strip().removesuffix(".").replace("\n", " ")
    text = text.replace("\\$", "").replace("$", "").replace("\N{MINUS SIGN}", "-")
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", text)
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text)
    text = text.replace("{,}", ",")
    text = re.sub(r"\^\{?\\circ\}?|\\degree(?![A-Za-z])|\\?%", "", text)
    without_units = _UNITS.sub("", text.strip())
    text = _TEXT.sub(r"\1", without_units if without_units.strip() else text)
    text = _SPACING.sub("", text)
    text = _THOUSANDS.sub("", text)
    text = _BARE_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _HALF_BARE_FRACTION.sub(r"\\frac\1{\2}", text)
    text = _BARE_ROOT.sub(r"\\sqrt{\1}", text)
    text = _TRAILING_ZEROS.sub(r"\1", text)
    text = _SOLVED_FOR.sub("", text, count=1) if _SOLVED_FOR.match(text) else text
    if text.startswith((".", "-.")):
        text = text.replace(".", "0.", 1)
    slash = _SLASH.fullmatch(text)
    return f"{slash[1]}\\frac{{{slash[2]}}}{{{slash[3]}}}" if slash else text


def _balanced(text: str) -> str | None:
    r"""Return what stands between the first brace and the one that closes it; ``\{`` is text."""
    depth = 0
    position = 0
    while position < len(text):
        letter = text[position]
        if letter == "\\":
            position += 2
            continue
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[1:position]
        position += 1
    return None

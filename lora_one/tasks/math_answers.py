r"""Read the final answer out of a solution to a competition problem. Pure text.

``stated_answer`` takes, from the part of a reply before the first ``"\nQ:"`` (where a base model
goes on to invent another question):

1. the content of the last ``\boxed{...}`` or ``\fbox{...}``, braces balanced;
2. else what follows the last "The answer is" (any case, with or without a colon), up to the end of
   the line, one pair of dollar signs and a closing full stop removed;
3. else None: a number somewhere in a reply is no stated answer.

Two comparisons of spellings, without doing mathematics:

* ``same_notation``: the two are one answer, written in two ways of LaTeX;
* ``same_spelling``, the strict comparison: the same once what one of them leaves out is forgiven: a
  unit, the variable that it solves for, separators of thousands.

What is equal as mathematics is for ``lora_one.tasks.math_equivalence``.
"""

import re
from typing import NamedTuple

from lora_one.tasks.answers import first_answer

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_STATEMENT = re.compile(r"the (?:final )?answer is:?", re.IGNORECASE)
# \boxed5 and \boxed\frac12 box the next token, as TeX reads it.
_BARE = re.compile(r"\\[A-Za-z]+(?:\{[^{}]*\})*|[^\s${}]")

_THIN = re.compile(r"\\[,!]")
# The second backslash of a row's end is no blank's: \\ 2 in a matrix.
_WIDE = re.compile(r"(?:(?<!\\)\\[;:> ]|\\q?quad(?![A-Za-z])|~|\s)+")
_BLANK = re.compile(r"(?<![0-9]) | (?![0-9])")  # between digits it says something: 3 1/2, not 31/2
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf|textrm)\{([^{}]*)\}")
_CONSTANT = re.compile(r"\\(?:text|mbox|mathrm|textbf|textrm)\{\s*([ie])\s*\}")
_DEGREES = re.compile(r"\^\\circ(?![A-Za-z])|\^\{\\circ\}|\\degree(?![A-Za-z])")
_SIGNS = {"\\%": "percent", "^\\circ": "degree", "\\$": "dollar"}
_UNIT = re.compile(r"(?<=[^{])\\text\{([A-Za-z.^0-9/]*)\}(\^\{?[0-9]\}?)?$")
_BARE_FRACTION = re.compile(r"\\frac([0-9A-Za-z])([0-9A-Za-z])")
_HALF_BARE_FRACTION = re.compile(r"\\frac(\{[^{}]*\})([0-9A-Za-z])")
_BARE_ROOT = re.compile(r"\\sqrt([0-9A-Za-z])")
_SLASH = re.compile(r"(-?)([0-9]+)/([0-9]+)")
# Braces or a negative space say that a comma separates thousands; a bare one may be a list's.
_MARKED_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|,\{\}|,\\!|\\!,)(?=[0-9]{3}(?![0-9]))")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
_BRACKETS = re.compile(r"[(\[]|\\\{")
_SOLVED_FOR = re.compile(r"([A-Za-z])=(?=[^=]+$)")
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


def same_notation(one: str, other: str) -> bool:
    r"""Tell whether two answers are one in two notations.

    Spaces, ``$``, ``\left``, ``\right``, display fractions and a full stop make no difference, nor
    ``\frac12``, ``\frac{1}{2}`` and ``1/2``, ``.5`` and ``0.5``, ``1{,}234`` and ``1234``.
    """
    return _finish(_notation(one)) == _finish(_notation(other))


def same_spelling(one: str, other: str) -> bool:
    r"""Tell whether two answers are the same once what one of them leaves out is forgiven.

    That is a unit (trailing ``\text{}``, percent, degree and dollar signs) or a leading ``x=``,
    which must be the same where both have one; and commas between thousands, except in brackets,
    where they may separate.
    """
    first, second = _spelling(one), _spelling(other)
    return first.core == second.core and all(
        not mine or not theirs or mine == theirs
        for mine, theirs in ((first.units, second.units), (first.variable, second.variable))
    )


def plain_constants(answer: str) -> str:
    r"""Write ``\mathrm{i}`` and ``\mathrm{e}`` as letters: math-verify drops such groups."""
    return _CONSTANT.sub(r"\1", answer)


class _Spelling(NamedTuple):
    core: str
    units: frozenset[str]
    variable: str


def _spelling(answer: str) -> _Spelling:
    text = _notation(answer)
    units = {name for sign, name in _SIGNS.items() if sign in text}
    for sign in _SIGNS:
        text = text.replace(sign, "")
    unit = _UNIT.search(text)
    if unit is not None:
        text = text[: unit.start()]
        units.add(_unit_name(unit[1] + (unit[2] or "")))
        units.discard("")
    text = _TEXT.sub(r"\1", text)
    if not _BRACKETS.search(text):
        text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    solved = _SOLVED_FOR.match(text)
    variable = solved[1] if solved else ""
    return _Spelling(_finish(text[solved.end() :] if solved else text), frozenset(units), variable)


def _unit_name(unit: str) -> str:
    """Write ``p.m.`` as ``pm``, ``cm^{2}`` as ``cm^2`` and ``hours`` as ``hour``."""
    name = re.sub(r"[.{}]", "", unit)
    return name.removesuffix("s") if len(name) > 3 else name


def _notation(answer: str) -> str:
    text = answer.strip().removesuffix(".").replace("\n", " ")
    text = re.sub(r"(?<!\\)\$", "", text).replace("\N{MINUS SIGN}", "-")
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", text)
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text)
    text = _MARKED_THOUSANDS.sub("", text).replace("{,}", ",")
    text = re.sub(r"\\?%", r"\\%", text)
    text = _DEGREES.sub(r"^\\circ", text)
    text = plain_constants(text)
    whole = _TEXT.fullmatch(text.strip())
    text = whole[1] if whole else _TEXT.sub(r"\\text{\1}", text)
    text = _BLANK.sub("", _WIDE.sub(" ", _THIN.sub("", text)))
    text = _BARE_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _HALF_BARE_FRACTION.sub(r"\\frac\1{\2}", text)
    text = _BARE_ROOT.sub(r"\\sqrt{\1}", text)
    return _TRAILING_ZEROS.sub(r"\1", text)


def _finish(text: str) -> str:
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

r"""Read one number out of text, exactly. Pure text; values are ``fractions.Fraction``.

How a number is written:

- An optional sign, before or after an optional currency sign or code: ``-$5``, ``$-5``, ``- 5``,
  ``USD 5``. The Unicode minus counts as a minus, and so does an en dash that touches the first
  number. In running text a "-" after a number or a closing bracket is a subtraction
  (``10 - 5`` ends in 5).
- Thousands separated by commas, narrow or unbreakable spaces, or as LaTeX does (``1{,}234``), in
  groups of three, and a decimal point: ``1,234.50``. Where a number is expected, plain spaces
  separate thousands as well: ``1 234``. Anything else with commas or several points (``1,23``,
  ``1.2.3``) and a clock time are not read at all.
- Scientific notation: ``1.5e3``, ``1.5 x 10^3``, ``1.5 \times 10^{3}``.
- A fraction of integers and a mixed number have their exact value: ``1/2``, ``1 1/2``, ``½`` and
  ``\frac{1}{2}``; ``1/2`` equals ``0.5``.
- A trailing full stop, percent sign or unit is ignored: ``18.``, ``20%`` and ``18 eggs``.
"""

import re
from decimal import Context, Decimal, Inexact
from fractions import Fraction
from unicodedata import normalize

# Longer digit strings come from a model stuck in a loop; Python refuses to convert very long ones.
LONGEST_NUMBER = 100

_SIGNS = str.maketrans(
    dict.fromkeys("\N{MINUS SIGN}\N{FULLWIDTH HYPHEN-MINUS}\N{SMALL HYPHEN-MINUS}", "-")
)
_LATEX_OPERATORS = {r"\times": "×", r"\cdot": "·", r"\div": "÷"}
_LATEX_FRACTION = re.compile(r"\s*\\[dt]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")
_VULGAR_FRACTION = re.compile("\\s*([\u00bc-\u00be\u2150-\u215e])")
_THOUSANDS = re.compile(
    r"(?<=[0-9])(?:[\u00a0\u2009\u202f]|\{,\}|\\!,|\\[,!;])(?=[0-9]{3}(?![0-9]))"
)

# What may stand before a number: spaces, punctuation, emphasis, LaTeX.
_LEAD = re.compile(r"[\s:=*_`\"'(\[{\\~≈]*(?:\$?\\?boxed\s*\{\s*)?")
# A calculation, or an unknown, and its equals sign: numbers, operators, one-letter names.
_CALCULATION = re.compile(
    r"(?:[-+*/×÷·^0-9.,%()$€£¥₹ \t{}]|(?<![A-Za-z])[A-Za-z](?![A-Za-z]))+=\s*"
)
# A number that is only the beginning of a calculation or of a range.
_GOES_ON = re.compile(r"[ \t]*[-+*/×÷·^\u2013xX][ \t]*[$€£]?[0-9(]")
# Everything that looks like one number, well formed or not; ``parse_number`` decides.
_TIMES_TEN = r"\s*[x×*·]\s*10\s*\^\s*\{?"
_NUMERAL = (
    r"(?:[0-9]+ (?=[0-9]+/[0-9]))?"  # the whole part of a mixed number
    r"(?:[0-9]|(?<![.\w])\.(?=[0-9]))[0-9.,:/]*+"
    rf"(?:(?:[eE]|{_TIMES_TEN})[-+]?[0-9]+\}}?)?"
)
_SPACED = r"[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?(?![0-9/,])"
_CURRENCY = r"(?:(?:US)?[$€£¥₹]|(?:USD|EUR|GBP|Rs\.?)(?= ?[-+0-9.]))"
_AT_START = re.compile(
    rf"(?P<outer>[-+])?\s*\\?(?:{_CURRENCY}\s*)?(?P<inner>[-+])?\s*"
    rf"(?P<numeral>{_SPACED}|{_NUMERAL})"
)
# In running text the sign touches its number, and digits inside a word (x2) are no number.
_ANYWHERE = re.compile(
    rf"(?P<outer>[-+])?\\?(?:{_CURRENCY} ?)?(?P<inner>[-+])?"
    rf"(?<![A-Za-z0-9_])(?P<numeral>{_NUMERAL})"
)
_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = re.compile(rf"{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+")
_FRACTION = re.compile(r"(?:(?P<whole>[0-9]+) )?(?P<above>[0-9]+)/(?P<below>[0-9]+)")
_SCIENTIFIC = re.compile(rf"(?P<digits>[0-9.,]+)(?:[eE]|{_TIMES_TEN})(?P<power>[-+]?[0-9]+)\}}?")


def number_at_start(text: str) -> Fraction | None:
    """Return the number that a text begins with, after punctuation and emphasis.

    A calculation counts by its result, and one without a result is no number: ``10 + 5 = 15`` and
    ``x = 15`` are 15; ``10 + 5`` and the range ``5-10`` are None.
    """
    text = _plain(text)
    start = _LEAD.match(text).end()
    while (calculation := _CALCULATION.match(text, start)) is not None:
        start = _LEAD.match(text, calculation.end()).end()
    if text[start : start + 1] == "\N{EN DASH}":
        text = f"{text[:start]}-{text[start + 1 :].removeprefix(' ')}"
    match = _AT_START.match(text, start)
    if match is None or (match["outer"] and match["inner"]):
        return None
    if _GOES_ON.match(text, match.end()):
        return None
    return _signed(match["outer"] or match["inner"], match["numeral"])


def last_number(text: str) -> Fraction | None:
    """Return the last number of a text; None where there is none, or where it is malformed."""
    text = _plain(text)
    matches = list(_ANYWHERE.finditer(text))
    if not matches:
        return None
    last = matches[-1]
    sign = last["outer"]
    if sign and _is_subtraction(text[: last.start()]):
        sign = None
    return _signed(last["inner"] or sign, last["numeral"])


def parse_number(numeral: str) -> Fraction | None:
    """Read an unsigned number such as ``1,234.5``, ``.5``, ``1/2``, ``1 1/2`` or ``2e3``."""
    numeral = numeral.rstrip(".,:/")
    if len(numeral) > LONGEST_NUMBER:
        return None
    if re.fullmatch(_SPACED, numeral):
        numeral = numeral.replace(" ", "")
    if _DECIMAL.fullmatch(numeral):
        return Fraction(numeral.replace(",", ""))
    scientific = _SCIENTIFIC.fullmatch(numeral)
    if scientific is not None:
        digits, power = parse_number(scientific["digits"]), int(scientific["power"])
        return (
            None
            if digits is None or abs(power) > LONGEST_NUMBER
            else digits * Fraction(10) ** power
        )
    match = _FRACTION.fullmatch(numeral)
    if match is None or int(match["below"]) == 0:
        return None
    return int(match["whole"] or 0) + Fraction(int(match["above"]), int(match["below"]))


def format_number(value: Fraction) -> str:
    """Write a number in one way: ``18``, ``0.5``, ``1/3`` where no finite decimal exists."""
    if value.denominator == 1:
        return str(value.numerator)
    exact = Context(prec=4 * LONGEST_NUMBER, traps=[Inexact])
    try:
        decimal = exact.divide(Decimal(value.numerator), Decimal(value.denominator))
    except Inexact:
        return str(value)
    return format(decimal.normalize(exact), "f")


def _plain(text: str) -> str:
    """Write minus signs, fractions, operators and separators of thousands in one way."""
    text = text.translate(_SIGNS)
    for command, operator in _LATEX_OPERATORS.items():
        text = text.replace(command, operator)
    text = _LATEX_FRACTION.sub(lambda m: _fraction(m, f"{m[1]}/{m[2]}"), text)
    text = _VULGAR_FRACTION.sub(
        lambda m: _fraction(m, normalize("NFKC", m[1]).replace("\N{FRACTION SLASH}", "/")), text
    )
    return _THOUSANDS.sub(",", text)


def _fraction(match: re.Match[str], written: str) -> str:
    """Put one space between a whole part and its fraction; keep what stands before otherwise."""
    before = match.string[: match.start()][-1:]
    space = match[0][: len(match[0]) - len(match[0].lstrip())]
    return f" {written}" if before.isdigit() else f"{space}{written}"


def _is_subtraction(before: str) -> bool:
    """A sign is binary when it touches a word or stands after a number or a closing bracket."""
    touches = before[-1:].isalnum() or before[-1:] in (")", "]", "}", "%", "_")
    rest = before.rstrip()[-1:]
    return bool(before) and (touches or rest.isdigit() or rest in (")", "]", "}", "%"))


def _signed(sign: str | None, numeral: str) -> Fraction | None:
    value = parse_number(numeral)
    return -value if value is not None and sign == "-" else value

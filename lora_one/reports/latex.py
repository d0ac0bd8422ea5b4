"""Tables for a paper: LaTeX with booktabs."""

from lora_one.reports.table import BEST, TIE, Results

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "≈": r"$\approx$",
    "·": r"$\cdot$",
    "†": r"\textdagger{}",
    "‡": r"\textdaggerdbl{}",
    "–": "--",
    "−": "$-$",
    "\n": " ",
}


def escape(text: str) -> str:
    """Return text that LaTeX prints as it is; letters it may not have become question marks."""
    printable = (letter if letter.isascii() or letter in _SPECIAL else "?" for letter in text)
    return "".join(_SPECIAL.get(letter, letter) for letter in printable)


def to_latex(results: Results, *, caption: str, label: str) -> str:
    r"""Return a ``table`` environment; the preamble needs ``\usepackage{booktabs}``.

    Args:
        results: Columns and rows of text; the first two columns are left-aligned.
        caption: Plain text.
        label: Of the table.
    """
    alignment = "".join("l" if index < 2 else "r" for index in range(len(results.columns)))
    lines = [
        r"% \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(caption)}}}",
        rf"\label{{{label}}}",
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        _line([escape(column) for column in results.columns]),
        r"\midrule",
    ]
    for index, row in enumerate(results.rows):
        lines.append(
            _line([_cell(cell, results.marks.get((index, at))) for at, cell in enumerate(row)])
        )
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def _cell(text: str, mark: str | None) -> str:
    if mark == BEST:
        return rf"\textbf{{{escape(text)}}}"
    return rf"$\approx$ {escape(text)}" if mark == TIE else escape(text)

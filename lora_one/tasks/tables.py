"""Tables as rows: tab- and comma-separated text and parquet, with every column count checked.

GLUE's ``.tsv`` files are not quoted: ``"`` is a letter there, often an unpaired one, and a reader
that takes it for a quote swallows the lines up to the next one. Comma-separated files are quoted
as in RFC 4180, so a field may hold commas and line ends.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_one.errors import InputError

Record = tuple[str, dict[str, Any]]
"""Where a row stands (for messages), and its columns."""


def read_tab_separated(
    path: Path, text: str, columns: Sequence[str] | None, *, leave_out_malformed: bool = False
) -> tuple[list[Record], int]:
    """Read tab-separated lines without quoting.

    Args:
        path: For messages.
        text: The file's content.
        columns: Their names, in a file without a header line; None: the first line names them.
        leave_out_malformed: Count lines with another number of columns instead of refusing them,
            as every public reader of Quora's question pairs has to.

    Returns:
        The rows, and the number of lines left out.

    Raises:
        InputError: A line with another number of columns (with its number), or a name twice.
    """
    # Only "\n" ends a line: str.splitlines would also cut at U+2028 and U+0085.
    lines = (
        (number, line.removesuffix("\r").split("\t"))
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    )
    return _as_records(path, lines, columns, leave_out_malformed)


def read_comma_separated(
    path: Path, text: str, columns: Sequence[str] | None
) -> tuple[list[Record], int]:
    """Read comma-separated, quoted rows; arguments and errors as for tabs, and for semicolons."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines = ((reader.line_num, fields) for fields in reader if fields)
    try:
        return _as_records(path, lines, columns, leave_out_malformed=False)
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from None


def read_parquet(path: Path) -> list[Record]:
    """Read a parquet file with pyarrow.

    Raises:
        InputError: pyarrow is not installed, or the file is no parquet file.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f"{path}: reading parquet needs the 'pyarrow' package: pip install 'lora-one[harness]'"
        ) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({error})") from None
    return [(f"{path}, row {index}", fields) for index, fields in enumerate(rows)]


def _as_records(
    path: Path,
    lines: Iterator[tuple[int, list[str]]],
    columns: Sequence[str] | None,
    leave_out_malformed: bool,
) -> tuple[list[Record], int]:
    if columns is None:
        number, columns = next(lines, (1, []))
        if len(columns) == 1 and ";" in columns[0]:
            raise InputError(
                f"{path}, line {number}: the header '{columns[0]}' looks separated by semicolons; "
                "expected commas in .csv and tabs in .tsv: save the file again with those"
            )
        twice = sorted({name for name in columns if columns.count(name) > 1})
        if twice:
            raise InputError(f"{path}, line {number}: the header names {', '.join(twice)} twice")
    rows, left_out = [], 0
    for number, fields in lines:
        if len(fields) == len(columns):
            rows.append((f"{path}, line {number}", dict(zip(columns, fields, strict=True))))
        elif leave_out_malformed:
            left_out += 1
        else:
            raise InputError(
                f"{path}, line {number}: {len(fields)} columns; expected {len(columns)} "
                f"({', '.join(columns)})"
            )
    return rows, left_out

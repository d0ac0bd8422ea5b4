import csv
import gzip

import pytest

from lora_one.errors import InputError
from lora_one.tasks.rows import read_file


def _write(folder, name, text, encoding="utf-8"):
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def _fields(path, **options):
    return [row.fields for row in read_file(path, **options).rows]


def test_a_quote_mark_is_a_letter_in_a_tsv(tmp_path):
    path = _write(tmp_path, "train.tsv", 'text\tlabel\n"one\t0\n"two" 3\t1\nthree"\t0\n')
    assert [row["text"] for row in _fields(path)] == ['"one', '"two" 3', 'three"']


@pytest.mark.parametrize("name", ["train.tsv", "train.txt"])
def test_a_bom_carriage_returns_and_blank_lines_are_harmless(tmp_path, name):
    path = _write(tmp_path, name, "\ufefftext\tlabel\r\none \t0\r\n\r\ntwo\u2028x\t1\r\n")
    assert _fields(path) == [{"text": "one ", "label": "0"}, {"text": "two\u2028x", "label": "1"}]


def test_a_line_keeps_its_empty_first_and_last_fields(tmp_path):
    path = _write(tmp_path, "train.tsv", "a\tb\tc\n\tx\t\n")
    assert _fields(path) == [{"a": "", "b": "x", "c": ""}]


def test_a_table_without_a_header_takes_the_given_names(tmp_path):
    tabs = _write(tmp_path, "train.tsv", "gj04\t1\t\tHe slept.\n")
    names = ("source", "label", "mark", "sentence")
    assert _fields(tabs, columns=names) == [
        {"source": "gj04", "label": "1", "mark": "", "sentence": "He slept."}
    ]
    commas = _write(tmp_path, "a_test.csv", '"What, then?","a, b",c\n')
    assert _fields(commas, columns=("question", "A", "B")) == [
        {"question": "What, then?", "A": "a, b", "B": "c"}
    ]


def test_a_csv_field_may_hold_commas_quotes_and_line_ends(tmp_path):
    rows = [{"q": 'say "hi",\nthen go', "a": "1"}, {"q": "x", "a": ""}]
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["q", "a"])
        writer.writeheader()
        writer.writerows(rows)
    assert _fields(tmp_path / "train.csv") == rows


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "a.csv",
            "a;b\n1,5;2\n",
            r"a\.csv, line 1: the header 'a;b' .*semicolons; expected commas",
        ),
        ("a.tsv", "a\tb\n1\t2\n1\n", r"a\.tsv, line 3: 1 columns; expected 2 \(a, b\)"),
        ("a.tsv", "a\tb\n\n1\t2\t3\n", r"a\.tsv, line 3: 3 columns; expected 2 \(a, b\)"),
        ("a.csv", 'a,b\n"x\ny",2\n1\n', r"a\.csv, line 4: 1 columns; expected 2 \(a, b\)"),
        ("a.csv", 'a,b\n"x,2\n', r"a\.csv, line 2: not valid CSV \(unexpected end of data\)"),
        ("a.tsv", "a\tb\ta\n1\t2\t3\n", "line 1: the header names a twice"),
        ("a.tsv", "a\tb\n", "the file is empty"),
        ("a.tsv", "", "the file is empty"),
        ("a.jsonl.gz", "{}", "not a whole gzip file"),
        ("a.parquet", "PAR1", "not a readable parquet file"),
        ("a.xlsx", "", r"cannot read '\.xlsx'; expected \.jsonl, .* or \.parquet"),
        ("a.gz", "", r"cannot read '\.gz'"),
    ],
)
def test_a_bad_table_is_named_with_its_line(tmp_path, name, text, said):
    with pytest.raises(InputError, match=said):
        read_file(_write(tmp_path, name, text))


def test_malformed_lines_are_left_out_and_counted_only_where_asked(tmp_path):
    path = _write(tmp_path, "train.tsv", "a\tb\n1\t2\nbroken\n3\t4\n")
    read = read_file(path, leave_out_malformed=True)
    assert [row.fields["a"] for row in read.rows] == ["1", "3"]
    assert [row.place for row in read.rows] == [f"{path}, line 2", f"{path}, line 4"]
    assert read.source["left_out"] == 1
    assert "left_out" not in read_file(_write(tmp_path, "b.tsv", "a\n1\n")).source


def test_a_compressed_file_reads_like_the_file(tmp_path):
    text = b'{"a": 1}\n{"a": 2}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "a.jsonl").write_bytes(text)
    assert _fields(tmp_path / "a.jsonl.gz") == _fields(tmp_path / "a.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(text)[:-9])
    with pytest.raises(InputError, match="not a whole gzip file"):
        read_file(tmp_path / "cut.jsonl.gz")


def test_parquet_keeps_types_and_numbers_its_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"sentence": "a\tb", "label": 1, "idx": 0}, {"sentence": '"', "label": -1, "idx": 1}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    read = read_file(tmp_path / "train.parquet")
    assert [row.fields for row in read.rows] == rows
    assert read.rows[1].place.endswith("train.parquet, row 1")

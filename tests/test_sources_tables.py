from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import pandas
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaletransfer.sources.tables import Table, find_table, read_list

# csv.writer leaves a lone carriage return unquoted, and csv.reader takes it for the end of a row.
CELLS = st.text(st.characters(exclude_characters="\r\x00\ufeff", exclude_categories=("Cs",)), max_size=8)


def write(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_the_first_name_that_is_there(tmp_path: Path) -> None:
    assert find_table(tmp_path, "a.csv", "b.csv") is None
    (tmp_path / "a.csv").mkdir()  # a folder is no table
    write(tmp_path / "b.csv", "")
    assert find_table(tmp_path, "a.csv", "b.csv") == tmp_path / "b.csv"
    write(tmp_path / "a.csv.gz", "")
    assert find_table(tmp_path, "a.csv", "b.csv") == tmp_path / "a.csv.gz"
    assert find_table(tmp_path, "b.csv", "a.csv") == tmp_path / "b.csv"


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_columns_in_the_order_that_was_asked_for(tmp_path: Path, name: str) -> None:
    table = Table(write(tmp_path / name, 'a, b ,c\r\n1,2,3\r\n\r\n4,,"6\n7"\r\n'), ["c", "a"])
    assert table.header == ("a", "b", "c")
    assert list(table.rows()) == list(table.rows()) == [(2, ("3", "1")), (5, ("6\n7", "4"))]
    assert list(Table(table.path, ["b"]).rows()) == [(2, ("2",)), (5, ("",))]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.lists(CELLS, min_size=3, max_size=3), max_size=5))
def test_cells_are_those_that_pandas_reads(tmp_path: Path, rows: list[list[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([["x", "y", "z"], *rows])
    path = write(tmp_path / "t.csv", text.getvalue())
    found = [list(cells) for _, cells in Table(path, ["x", "y", "z"]).rows()]
    assert found == rows
    theirs = pandas.read_csv(path, dtype=str, keep_default_na=False, skip_blank_lines=False)
    assert found == theirs.to_numpy().tolist()


@pytest.mark.parametrize(
    "text, words",
    [
        ("a,bb,c\n", r"t\.csv lacks the column 'b' \(did you mean 'bb'\?\)"),
        ("a,c\n", r"t\.csv lacks the column 'b'; use"),
        ("", r"t\.csv lacks the column 'a'"),
        ("a,b,b\n", r"t\.csv has twice the column 'b'"),
    ],
)
def test_a_header_without_the_columns(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Table(write(tmp_path / "t.csv", text), ["a", "b"])


def test_rows_that_can_not_be_read(tmp_path: Path) -> None:
    for text, words in (
        ("a,b\n1,2\n3\n", r"t\.csv, line 3: the row has 1 cells, the header 2"),
        ("a,b\n1,2,3\n", r"t\.csv, line 2: the row has 3 cells"),
        ('a,b\n1,"2"3\n', r"t\.csv, after line \d: not a readable table"),
        ('a,b\n1,"2\n', r"t\.csv, after line \d: not a readable table"),
    ):
        table = Table(write(tmp_path / "t.csv", text), ["a", "b"])
        with pytest.raises(ValueError, match=words):
            list(table.rows())
    with pytest.raises(ValueError, match="not a readable table"):
        Table(write(tmp_path / "t.csv", "a").with_suffix(".csv").rename(tmp_path / "t.csv.gz"), ["a"])


def test_a_damaged_archive(tmp_path: Path) -> None:
    whole = gzip.compress("\n".join(["a", *map(str, range(50_000))]).encode())
    middle = len(whole) // 2
    for data in (whole[:middle], whole[:middle] + b"\xff" * 64 + whole[middle + 64 :]):
        (tmp_path / "t.csv.gz").write_bytes(data)
        with pytest.raises(ValueError, match=r"t\.csv\.gz, after line \d+: not a readable table"):
            list(Table(tmp_path / "t.csv.gz", ["a"]).rows())
        with pytest.raises(ValueError, match=r"t\.csv\.gz, (after )?line \d+: "):  # garbage may repeat a name first
            read_list(tmp_path / "t.csv.gz")


def test_lists(tmp_path: Path) -> None:
    path = write(tmp_path / "list.txt", "\ufeffb.png\r\n\r\n a.png \nc d.png")
    assert list(read_list(path).items()) == [("b.png", 1), ("a.png", 3), ("c d.png", 4)]
    with pytest.raises(ValueError, match=r"list\.txt, line 3: x is already in line 1"):
        read_list(write(path, "x\ny\nx\n"))
    path.write_bytes(b"ok\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"list\.txt, after line \d: not a readable list"):
        read_list(path)
    assert read_list(write(path, "")) == {}

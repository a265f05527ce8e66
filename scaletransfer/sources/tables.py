"""The tables and lists that data sets come with: comma-separated files and lists of names, plain or gzipped.

The stdlib's csv module reads a quarter of a million rows in about a second and lets an error name its line.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TextIO

from scaletransfer.sources.base import nearest


def find_table(folder: Path, *names: str) -> Path | None:
    """The first file of `folder` that is there: of each name in turn, the name itself, then name + ".gz"."""
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    return None


class Table:
    """Some columns of a comma-separated table with a header, in UTF-8, gzipped if its name ends in .gz.

    path: the file. columns: names of the wanted columns; in the file they may stand anywhere, among others.
    Raises ValueError, naming the file, if it can't be read, or if one of `columns` isn't there exactly once (then with
    the column, and the nearest other one).
    """

    path: Path
    header: tuple[str, ...]
    """Every column of the file, without blanks around the names."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        assert columns, "a table is read for some columns"
        self.path, self._columns = path, tuple(columns)
        with _open(path) as stream:
            self.header = _header(_lines(path, stream))
        for column in self._columns:
            if self.header.count(column) != 1:
                what = "lacks" if column not in self.header else "has twice"
                hint = nearest(column, set(self.header) - set(self._columns)) if column not in self.header else ""
                raise ValueError(f"{path} {what} the column {column!r}{hint}; use the official table.")

    def rows(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """(line number, cells of `columns` in that order, as they are) of every row; empty lines are no rows.

        The line is the row's last one where a quoted cell spans several. Raises ValueError, naming file and line, for
        a row with another number of cells than the header, and where the file can't be read on.
        """
        at = [self.header.index(column) for column in self._columns]
        cells: Callable[[list[str]], tuple[str, ...]] = itemgetter(*at) if len(at) > 1 else lambda row: (row[at[0]],)
        width = len(self.header)
        with _open(self.path) as stream:
            lines = _lines(self.path, stream)
            _header(lines)
            for line, row in lines:
                if len(row) != width:
                    raise ValueError(
                        f"{self.path}, line {line}: the row has {len(row)} cells, the header {width}; mend the row."
                    )
                yield line, cells(row)


def read_list(path: Path) -> dict[str, int]:
    """{name: its line number} of a text file with one name a line, in its order; blank lines count, but name nothing.

    Raises ValueError, naming the file and both lines, for a repeated name, and for a file that isn't UTF-8 text.
    """
    found: dict[str, int] = {}
    line = 0
    try:
        with _open(path) as stream:
            for line, text in enumerate(stream, 1):
                name = text.strip()
                if name and found.setdefault(name, line) != line:
                    raise ValueError(
                        f"{path}, line {line}: {name} is already in line {found[name]}; remove one of the two."
                    )
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}, after line {line}: not a readable list ({error}); download it again.") from error
    return found


def _open(path: Path) -> TextIO:
    # utf-8-sig: spreadsheet programs put a byte-order mark before the header.
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _lines(path: Path, stream: TextIO) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of every line that isn't empty; what makes a file unreadable becomes a ValueError."""
    reader = csv.reader(stream, strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except (csv.Error, UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}, after line {reader.line_num}: not a readable table ({error}); download it again."
        ) from error


def _header(lines: Iterator[tuple[int, list[str]]]) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in next(lines, (0, []))[1])

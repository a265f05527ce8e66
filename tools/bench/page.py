"""What a command writes into a page of docs/: between two marks, which stand there once each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def parts(text: str, begin: str, end: str) -> tuple[str, str, str]:
    """What stands before, between and behind the marks.

    Raises:
        ValueError: a mark is not there, or there more than once.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ValueError(f"there is no one place to write to: put the lines {begin} and {end} there")
    before, rest = text.split(begin)
    inside, after = rest.split(end)
    return before, inside, after


def check(path: Path, begin: str, end: str) -> tuple[str, str, str]:
    """The ``parts`` of a page that is to be written.

    Raises:
        ValueError: it has not both marks.
    """
    try:
        return parts(path.read_text(encoding="utf-8"), begin, end)
    except ValueError as error:
        raise ValueError(f"--write {path}: {error}") from None


def put(path: Path, begin: str, end: str, text: str) -> None:
    """Put ``text`` between the marks of a page.

    Raises:
        ValueError: it has not both marks.
    """
    before, _, after = check(path, begin, end)
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def joined(old: str, new: Sequence[str], keys: int, order: Callable[[tuple[str, ...]], Any]) -> list[str]:
    """The lines of a Markdown table ``new`` (head, rule, rows) and those rows of ``old`` that it does not have.

    Args:
        old: text of a table, or nothing.
        keys: so many first cells name a row.
        order: what rows are sorted by, of their first cells.
    """
    rows = [line for line in old.strip().splitlines() if line.startswith("|")][2:] + list(new[2:])
    by_key = {tuple(cell.strip() for cell in row.split("|")[1 : keys + 1]): row for row in rows}
    return [*new[:2], *(by_key[key] for key in sorted(by_key, key=order))]

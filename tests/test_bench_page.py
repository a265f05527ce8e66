"""tools/bench/page.py: what commands write into pages stands between its marks, and nothing else changes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from bench.page import check, joined, put

MARKS = ("<!-- begin -->", "<!-- end -->")


def test_the_text_stands_between_its_marks_and_nothing_else_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin -->\n| old |\n<!-- end -->\nafter\n")
    for text in ("| new |", "| newer |"):
        put(page, *MARKS, text)
        assert page.read_text() == f"before\n<!-- begin -->\n\n{text}\n\n<!-- end -->\nafter\n"


@pytest.mark.parametrize("text", ["no marks", "<!-- begin -->", "<!-- end --><!-- begin -->", "<!-- begin -->" * 2])
def test_a_page_without_its_marks_is_refused_before_anything_is_measured(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=r"page\.md: there is no one place to write to: put the lines <!-- begin -->"):
        check(page, *MARKS)
    with pytest.raises(ValueError, match="no one place"):
        put(page, *MARKS, "| new |")
    assert page.read_text() == text


def test_rows_that_were_not_measured_again_stay() -> None:
    old = "| a | b | c |\n|---|---|---|\n| x | 2 | old |\n| x | 10 | old |\n"
    new = ["| a | b | d |", "|---|---|---|", "| x | 1 | new |", "| x | 2 | new |"]
    rows = joined(old, new, 2, lambda key: (key[0], int(key[1])))
    assert rows == [*new[:2], "| x | 1 | new |", "| x | 2 | new |", "| x | 10 | old |"]
    assert joined("", new, 2, lambda key: key) == new

"""tools/bench/planner.py: the planner against real steps, and the table that it writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from bench.planner import BEGIN, CASES, END, Line, compare, table, update

ENGINES = [
    ("single", 1),
    ("ddp", 2),
    ("fsdp2", 2),
    ("hsdp", 4),
    ("zero1", 2),
    ("zero2", 2),
    ("zero3", 2),
    ("zero3", 4),
    ("zero3_offload", 2),
]


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("engine", "ranks"), ENGINES, ids=[f"{engine}-{ranks}" for engine, ranks in ENGINES])
def test_memory_and_traffic_are_within_a_tenth_of_what_is_measured(engine: str, ranks: int) -> None:
    lines = compare(engine, ranks, CASES, limit=1700)
    assert [line.case for line in lines] == list(CASES)
    for line in lines:
        assert line.planned == pytest.approx(line.measured, rel=0.1), line
        assert line.planned_sent == pytest.approx(line.measured_sent, rel=0.002), line
        assert (line.measured_sent > 0) == (ranks > 1)


def made(engine: str, ranks: int, case: str, planned: int) -> Line:
    return Line(
        engine=engine,
        ranks=ranks,
        case=case,
        planned=planned << 20,
        measured=100 << 20,
        planned_sent=0,
        measured_sent=0,
    )


def test_the_table_keeps_what_was_not_measured_again() -> None:
    first = table([made("fsdp2", 2, "large batch", 101), made("single", 1, "small batch", 102)])
    once = update(f"before\n{BEGIN}\n{END}\nafter\n", first)
    twice = update(once, table([made("fsdp2", 2, "small batch", 103), made("single", 1, "small batch", 110)]))
    assert twice.startswith(f"before\n{BEGIN}\n") and twice.endswith(f"{END}\nafter\n")
    rows = [line.split(" | ")[:4] for line in twice.splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        ["| single", "1", "small batch", "110"],
        ["| fsdp2", "2", "small batch", "103"],
        ["| fsdp2", "2", "large batch", "101"],
    ]
    assert update(twice, table([made("fsdp2", 2, "small batch", 103)])) == twice

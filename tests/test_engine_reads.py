"""A rank reads about its share of the bytes, and this check fails where one rank reads for the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from helpers_run import reading

pytestmark = pytest.mark.engine

CASES = ("own", "own, by workers", "everyone", "rank 0", "rank 0, quiet")
HEADER = 512  # the tar header before an image is read with it


def unfair(read: Sequence[int], epoch: int) -> list[str]:
    """What is wrong with the bytes that each rank read of an epoch's; nothing where each read about 1/world."""
    share = epoch / len(read)
    found = [f"rank {rank} read {size / epoch:.0%}" for rank, size in enumerate(read) if size > 1.2 * share]
    return found + [f"rank {rank} read only {n / epoch:.0%}" for rank, n in enumerate(read) if n < 0.8 * share]


def asked_for(case: str) -> tuple[list[int], int]:
    """Bytes that each rank asked the operating system for, and those of an epoch."""
    found = reading()
    return [rank["read"][case] for rank in found["ranks"]], int((found["sizes"] + HEADER).sum())


def logged(case: str) -> tuple[list[int], int]:
    """`bytes_read` of metrics.jsonl at the end of the epoch, and the bytes of its images."""
    found = reading()
    return found["logged"][CASES.index(case)], int(found["sizes"].sum())


@pytest.mark.parametrize("case", ["own", "own, by workers"])
def test_each_rank_reads_its_share(case):
    for read, epoch in (asked_for(case), logged(case)):
        assert len(read) == 2 and unfair(read, epoch) == []
        assert sum(read) == epoch  # every image once


def test_workers_read_what_the_process_itself_would():
    assert asked_for("own") == asked_for("own, by workers")
    assert logged("own") == logged("own, by workers")


def test_the_check_fails_where_everyone_reads_everything():
    for read, epoch in (asked_for("everyone"), logged("everyone")):
        assert len(unfair(read, epoch)) == 2


def test_the_check_fails_where_rank_0_reads_for_the_others():
    for read, epoch in (asked_for("rank 0"), logged("rank 0")):
        assert unfair(read, epoch) == ["rank 0 read 100%", "rank 1 read only 0%"]


def test_the_check_does_not_believe_what_the_loader_books():
    """A dispatcher that books each rank its share: metrics.jsonl looks right, the system calls do not."""
    assert unfair(*logged("rank 0, quiet")) == []
    assert unfair(*asked_for("rank 0, quiet")) == ["rank 0 read 100%", "rank 1 read only 0%"]


def test_all_disguises_train_on_the_same_images():
    """They are faults of reading alone: the training is the same, so nothing else would notice them."""
    assert np.ptp([sum(asked_for(case)[0]) for case in ("own", "rank 0", "rank 0, quiet")]) == 0

"""Batches prepared ahead: bounded in bytes, and nothing goes on when nobody wants them any more."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time

import pytest
from helpers_loader import SIZE, dataset, small_chexpert, small_shards, source

from scaletransfer.index import load_index
from scaletransfer.loader import StepSampler
from scaletransfer.storage_errors import StorageError
from scaletransfer.streams import batches, make_loader

BATCH = 12


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return load_index(small_shards(small_chexpert(tmp_path_factory.mktemp("streams"))))


def sampler(steps: int) -> StepSampler:
    return StepSampler(0, steps * BATCH, 0, 1, BATCH, BATCH)


@pytest.mark.parametrize(("allowed", "most"), [(0.001, 1), (1.5, 1), (2.5, 2), (4, 4), (1000, 12)])
def test_threads_hold_no_more_than_is_allowed(index, allowed, most, monkeypatch):
    data = dataset([source(index)], batch=BATCH)
    begin, finish, held, largest = data.begin, data.finish, 0, 0

    def began(positions, *, pinned):
        nonlocal held, largest
        held += 1
        largest = max(largest, held)
        return begin(positions, pinned=pinned)

    def finished(pending):
        nonlocal held
        held -= 1
        return finish(pending)

    monkeypatch.setattr(data, "begin", began)
    monkeypatch.setattr(data, "finish", finished)
    size = BATCH * SIZE * SIZE / 1e6
    loader = make_loader(data, sampler(30), 3, "threads", allowed * size)
    assert len(list(batches(loader))) == 30 and largest == most and held == 0


def counted() -> tuple[int, int]:
    """Threads of loaders, and child processes: other threads of this process end when they like."""
    names = ("read-and-decode", "QueueFeeder")
    threads = sum(thread.name.startswith(names) for thread in threading.enumerate())
    return threads, len(multiprocessing.active_children())


def soon(expected: tuple[int, int]) -> bool:
    """Whether no more of either are left, in a moment."""
    end = time.monotonic() + 10
    while any(now > before for now, before in zip(counted(), expected, strict=True)):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_a_consumer_that_stops_leaves_nothing_behind(index, kind):
    data = dataset([source(index)], batch=BATCH)
    before = counted()
    opened = []
    for _ in range(4):
        stream = batches(make_loader(data, sampler(200), 2, kind))
        next(stream)
        assert counted() != before
        stream.close()
        assert soon(before)
        opened.append(len(os.listdir("/proc/self/fd")))
    assert opened[-1] <= opened[1]

    def fails() -> None:
        for _ in batches(make_loader(data, sampler(200), 2, kind)):
            raise KeyError("of the training loop")

    with pytest.raises(KeyError):
        fails()
    assert soon(before)


def test_threads_stop_after_the_sample_that_they_are_at(index, monkeypatch):
    data = dataset([source(index)], batch=BATCH)
    load = data.load

    def slow(pending, number):
        if pending.positions[0]:  # all but the first batch
            time.sleep(0.2)
        load(pending, number)

    monkeypatch.setattr(data, "load", slow)
    stream = batches(make_loader(data, sampler(200), 1, "threads"))
    next(stream)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 0.5  # a piece has three samples


def test_threads_wait_for_a_server_that_is_gone_once(index, monkeypatch):
    data = dataset([source(index)], batch=BATCH)
    asked = []

    def gone(pending, number):
        asked.append(number)
        time.sleep(0.3 if len(asked) % 2 else 0.2)
        raise StorageError("the server is gone")

    monkeypatch.setattr(data, "load", gone)
    with pytest.raises(StorageError, match="is gone"):
        next(batches(make_loader(data, sampler(200), 2, "threads")))
    assert len(asked) == 2


def test_processes_count_what_they_read_from_0(index):
    data = dataset([source(index)], batch=BATCH)
    data.reader.counters.remote_bytes = 1000
    assert data[0]["reads"].tolist() == [1000, 0, 0, 0] and data[1]["reads"].tolist() == [0, 0, 0, 0]
    found = batches(make_loader(data, sampler(3), 1, "processes"))
    assert [batch["reads"].tolist() for batch in found] == [[0, 0, 0, 0]] * 3

"""Whole shards kept on a disk: by many processes, within a limit, and never a wrong one."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from scaletransfer import shard_cache, storage
from scaletransfer.shard_cache import ShardCache
from scaletransfer.storage_errors import DiskFull
from scaletransfer.storage_settings import ReadCounters, RemoteSettings

pytest_plugins = ("helpers_s3",)
SIZE = 100_000
SHARDS = [bytes([number]) * SIZE for number in range(6)]


@pytest.fixture
def urls(s3) -> list[str]:
    return [s3.put_bytes(data, f"cached/train-{number:06d}.tar") for number, data in enumerate(SHARDS)]


def made(tmp_path: Path, **more) -> ShardCache:
    settings = {"cache_dir": str(tmp_path / "cache"), "attempts": 2, "timeout": 5.0, **more}
    return ShardCache(RemoteSettings(**settings), ReadCounters())


def content(cache: ShardCache, urls: list[str], number: int, data: bytes | None = None) -> bytes | None:
    data = SHARDS[number] if data is None else data
    found = cache.open(urls[number], len(data), hashlib.sha256(data).hexdigest())
    if found is None:
        return None
    try:
        return os.pread(found, 2 * SIZE, 0)
    finally:
        os.close(found)


def kept(cache: ShardCache) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in cache.folder.iterdir() if path.name != ".lock"}


def test_a_shard_is_downloaded_once(urls, front, tmp_path):
    cache = made(tmp_path)
    assert content(cache, urls, 0) == SHARDS[0] == content(cache, urls, 0)
    assert content(made(tmp_path), urls, 0) == SHARDS[0]  # another process, another run
    assert len(front.requests) == 1 and list(kept(cache).values()) == [SIZE]
    assert cache.counters == ReadCounters(remote_bytes=SIZE, cache_hits=1, cache_misses=1)


def test_what_was_used_last_stays_within_the_limit(urls, front, tmp_path):
    cache = made(tmp_path, cache_bytes=3 * SIZE + 10)
    for number in (0, 1, 2):
        assert content(cache, urls, number) == SHARDS[number]
        time.sleep(0.02)
    content(cache, urls, 0)
    time.sleep(0.02)
    assert content(cache, urls, 3) == SHARDS[3]  # in the place of 1
    assert sum(kept(cache).values()) == 3 * SIZE
    front.requests.clear()
    for number in (0, 2, 3):
        content(cache, urls, number)
    assert front.requests == []
    content(cache, urls, 1)
    assert len(front.requests) == 1


def test_a_shard_larger_than_the_limit_is_not_kept(urls, front, tmp_path):
    cache = made(tmp_path, cache_bytes=SIZE - 1)
    assert content(cache, urls, 0) is None and front.requests == [] and cache.counters == ReadCounters()


def test_an_open_shard_can_be_removed(urls, s3, tmp_path):
    cache = made(tmp_path, cache_bytes=SIZE)
    first = cache.open(urls[0], SIZE, hashlib.sha256(SHARDS[0]).hexdigest())
    assert content(cache, urls, 1) == SHARDS[1] and list(kept(cache).values()) == [SIZE]
    assert first is not None and os.pread(first, SIZE, 0) == SHARDS[0]
    os.close(first)


def test_flipped_bytes_and_other_lengths_are_refused(urls, s3, tmp_path):
    cache = made(tmp_path)
    flipped = SHARDS[0][:500] + b"\x01" + SHARDS[0][501:]
    s3.put_bytes(flipped, "cached/train-000000.tar")
    with pytest.raises(ValueError, match=f"{urls[0]} is damaged or of another index .sha256 differs.: copy"):
        content(cache, urls, 0)
    s3.put_bytes(SHARDS[1][:-1], "cached/train-000001.tar")
    with pytest.raises(ValueError, match=f"{urls[1]} ends after 99999 bytes where 100000 were expected"):
        content(cache, urls, 1)
    assert kept(cache) == {}
    s3.put_bytes(SHARDS[0], "cached/train-000000.tar")
    assert content(cache, urls, 0) == SHARDS[0]


def test_a_connection_that_breaks_leaves_nothing(urls, front, tmp_path):
    cache = made(tmp_path)
    front.faults = ["cut", "cut"]
    with pytest.raises(ValueError, match=f"{urls[0]} cannot be read after 2 attempts"):
        content(cache, urls, 0)
    assert kept(cache) == {}


def test_a_shard_with_another_hash_is_another_file(urls, s3, front, tmp_path):
    cache = made(tmp_path)
    content(cache, urls, 0)
    s3.put_bytes(SHARDS[5], "cached/train-000000.tar")  # the folder was made again, its index names another hash
    assert content(cache, urls, 0, SHARDS[5]) == SHARDS[5]
    assert len(front.requests) == 2


def test_a_file_that_was_cut_on_the_disk_is_downloaded_again(urls, front, tmp_path):
    cache = made(tmp_path)
    content(cache, urls, 0)
    os.truncate(cache.path(urls[0], SIZE, hashlib.sha256(SHARDS[0]).hexdigest()), 50)
    assert content(cache, urls, 0) == SHARDS[0] and len(front.requests) == 2


def everything(folder: Path, urls: list[str], seed: int, limit: int, most) -> None:
    cache = ShardCache(RemoteSettings(cache_dir=str(folder), cache_bytes=limit, attempts=3, timeout=20.0))
    for turn in range(4):
        for number in range(len(urls)):
            own = (number * (seed + 1) + turn) % len(urls)
            found = content(cache, urls, own)
            assert found in (SHARDS[own], None)
            total = 0
            with cache._alone():
                for path in cache.folder.glob("*.tar*"):
                    with suppress(FileNotFoundError):  # who has waited removes what it waited for
                        total += path.stat().st_size
            with most.get_lock():
                most.value = max(most.value, total)
    os._exit(7)


def test_processes_share_a_cache_and_its_limit(urls, s3, tmp_path):
    """Four processes, three of six shards fit. What they see together is never more than the limit."""
    context = multiprocessing.get_context("fork")
    most = context.Value("q", 0)
    arguments = (tmp_path / "cache", urls)
    many = [context.Process(target=everything, args=(*arguments, seed, 3 * SIZE, most)) for seed in range(4)]
    for process in many:
        process.start()
    for process in many:
        process.join(120)
    assert [process.exitcode for process in many] == [7] * 4
    assert 0 < most.value <= 3 * SIZE
    assert not list((tmp_path / "cache" / "shards").glob("*.part"))


def test_of_many_threads_and_processes_one_downloads(urls, front, tmp_path):
    sha256 = hashlib.sha256(SHARDS[0]).hexdigest()
    caches = [made(tmp_path) for _ in range(2)]
    found: list[int | None] = []
    threads = [
        threading.Thread(target=lambda cache=cache: found.append(cache.open(urls[0], SIZE, sha256)))
        for cache in caches * 4
    ]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=lambda: os._exit(content(made(tmp_path), urls, 0) == SHARDS[0])) for _ in "ab"]
    for one in (*processes, *threads):
        one.start()
    for one in (*processes, *threads):
        one.join(60)
    assert [process.exitcode for process in processes] == [1, 1] and len(found) == 8
    for handle in found:
        assert handle is not None and os.pread(handle, SIZE, 0) == SHARDS[0]
        os.close(handle)
    assert len(front.requests) == 1


def hold(folder: Path, urls: list[str], begun) -> None:
    def slowly(*args, **kwargs):
        begun.set()
        time.sleep(100)

    storage.download = slowly
    content(ShardCache(RemoteSettings(cache_dir=str(folder))), urls, 0)


@pytest.mark.parametrize("then", [0, 1])
def test_a_process_that_is_killed_while_it_downloads_blocks_nobody(urls, s3, tmp_path, then):
    """Neither who waits for the same shard nor who needs the room."""
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    holder = context.Process(target=hold, args=(tmp_path / "cache", urls, begun))
    holder.start()
    assert begun.wait(30)
    cache = made(tmp_path, cache_bytes=SIZE)
    assert content(cache, urls, 1) is None  # all room is taken by the download, which is seen at its full size
    waiting = threading.Timer(0.2, lambda: os.kill(holder.pid, signal.SIGKILL))
    waiting.start()
    if then:
        holder.join()
    assert content(cache, urls, then) == SHARDS[then]
    holder.join()
    waiting.join()
    assert list(kept(cache).values()) == [SIZE]


def test_a_full_disk_is_said_once_and_ranges_go_on(urls, s3, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    cache = made(tmp_path)
    monkeypatch.setattr(shard_cache.os, "posix_fallocate", full)
    with pytest.warns(UserWarning, match="is full; its shards are read by ranges instead: free some space") as warned:
        assert content(cache, urls, 0) is None and content(cache, urls, 1) is None
    assert len(warned) == 1 and kept(cache) == {}
    monkeypatch.undo()


def test_a_full_disk_in_the_middle_is_the_same(urls, s3, tmp_path, monkeypatch):
    def full(url, path, *args, **kwargs):
        raise DiskFull(f"{url} cannot be copied to {path}")

    cache = made(tmp_path)
    monkeypatch.setattr(storage, "download", full)
    with pytest.warns(UserWarning, match="are read by ranges instead"):
        assert content(cache, urls, 0) is None
    assert kept(cache) == {}


def test_a_folder_that_cannot_be_used_names_the_option(urls, s3, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file.*set data.remote.cache_dir to a folder that can be written"):
        content(made(tmp_path, cache_dir=str(tmp_path / "file" / "below")), urls, 0)

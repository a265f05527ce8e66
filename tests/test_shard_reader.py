"""Shards are read in place: files by many threads, folders behind URLs by ranges or through the cache."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from helpers_run import make_shards

from scaletransfer import shard_reader
from scaletransfer.index import ShardIndex, load_index
from scaletransfer.shard_reader import ShardReader, image_place, read_image
from scaletransfer.storage_errors import MissingObject, StorageError
from scaletransfer.storage_settings import ReadCounters, RemoteSettings

pytest_plugins = ("helpers_s3",)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("made"), rows=40, valid=5, shard_size=8)


def settings(tmp_path: Path, **more) -> RemoteSettings:
    return RemoteSettings(**{"cache_dir": str(tmp_path / "cache"), "attempts": 2, "timeout": 5.0, **more})


def images(reader: ShardReader, index: ShardIndex, split: str = "train") -> list[bytes]:
    return [read_image(reader, index, split, row) for row in range(index.splits[split].samples)]


def spoil(folder: Path, to: Path, row: int, change) -> ShardIndex:
    """The index of a copy of the folder whose bytes before and of one image of `train` were changed."""
    shutil.copytree(folder, to)
    index = load_index(to)
    entry = index.table("train")[row]
    with index.path("train", int(entry["shard"])).open("r+b") as file:
        change(file, int(entry["offset"]))
    return index


# Files on a disk


def test_a_file_is_read_in_place(tmp_path):
    data = np.random.default_rng(0).bytes(5000)
    (tmp_path / "a").write_bytes(data)
    reader = ShardReader()
    assert reader.read(str(tmp_path / "a"), 100, 1000) == data[100:1100]
    assert reader.read(f"file://{tmp_path}/a", 0, 10) == data[:10]
    with pytest.raises(ValueError, match=r"a ends inside an image \(offset 4500, 500 of 600 bytes\): it was cut"):
        reader.read(str(tmp_path / "a"), 4500, 600, "it was cut")
    with pytest.raises(FileNotFoundError):
        reader.read(str(tmp_path / "b"), 0, 1)
    assert reader.counters == ReadCounters(bytes_read=1510)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_threads_share_a_few_open_files(tmp_path, monkeypatch):
    """No file is closed, or its number given to another one, while somebody reads it; and none stays open."""
    monkeypatch.setattr(shard_reader, "_OPEN_FILES", 3)
    paths = []
    for number in range(12):
        paths.append(str(tmp_path / str(number)))
        Path(paths[-1]).write_bytes(bytes([number]) * 50_000)
    reader, before = ShardReader(), open_files()
    wrong: list[object] = []

    def read(seed: int) -> None:
        draw = np.random.default_rng(seed)
        try:
            for number in draw.integers(0, 12, 600).tolist():
                if reader.read(paths[number], int(draw.integers(0, 10_000)), 40_000) != bytes([number]) * 40_000:
                    wrong.append(number)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and open_files() - before == 3
    assert reader.counters.bytes_read == 8 * 600 * 40_000


def test_a_low_limit_of_open_files_is_shared_with_others(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_reader.resource, "getrlimit", lambda _: (64, 64))
    reader, before = ShardReader(), open_files()
    for number in range(20):
        (tmp_path / str(number)).write_bytes(bytes([number]))
        assert reader.read(str(tmp_path / str(number)), 0, 1) == bytes([number])
    assert open_files() - before == 64 // 8


def test_a_forked_process_and_a_copy_begin_anew(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    reader = ShardReader(RemoteSettings(attempts=7))
    reader.read(str(tmp_path / "a"), 0, 60)
    copy = pickle.loads(pickle.dumps(reader))  # noqa: S301
    assert copy.remote.attempts == 7 and copy.counters == ReadCounters()
    assert copy.read(str(tmp_path / "a"), 0, 5) == b"xxxxx"

    def child() -> None:
        clean = reader.counters == ReadCounters() and reader.read(str(tmp_path / "a"), 0, 5) == b"xxxxx"
        os._exit(7 if clean else 1)

    held = threading.Event()
    done = threading.Event()

    def hold() -> None:
        with reader._lock:
            held.set()
            done.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(30)
    process = multiprocessing.get_context("fork").Process(target=child)  # while a thread has the lock
    process.start()
    process.join(30)
    done.set()
    holder.join()
    assert process.exitcode == 7 and reader.counters.bytes_read == 60


def test_nothing_grows_with_the_number_of_reads(shards):
    index, reader = load_index(shards), ShardReader()
    images(reader, index)
    before = (open_files(), len(pickle.dumps(index)), len(reader._files), len(reader._shards))
    for _ in range(20):
        images(reader, index)
    assert (open_files(), len(pickle.dumps(index)), len(reader._files), len(reader._shards)) == before


# Folders behind URLs


def test_a_folder_behind_a_url_is_the_folder(shards, s3, tmp_path):
    url = s3.put(shards, "chexpert")
    here, there = load_index(shards), load_index(f"{url}/", settings(tmp_path))
    assert there.url == url and there.folder.parent == tmp_path / "cache" / "indexes"
    assert (there.digest, there.splits, there.label_names) == (here.digest, here.splits, here.label_names)
    for split in here.splits:
        assert (there.table(split) == here.table(split)).all()
        for mode in ("range", "cache"):
            assert images(ShardReader(settings(tmp_path, mode=mode)), there, split) == images(
                ShardReader(), here, split
            )
    copy = pickle.loads(pickle.dumps(there))  # noqa: S301
    assert there.place("train", 0) == f"{url}/train-000000.tar" == copy.place("train", 0)
    assert here.place("train", 0) == str(shards / "train-000000.tar")
    assert f"{url}/train-000000.tar at offset" in image_place(there, "train", 0)
    with pytest.raises(ValueError, match=f"{url} is not on a disk: copy"):
        there.path("train", 0)
    disk = load_index(f"file://{shards}")
    assert disk.url == "" and disk.folder == shards and disk.splits == here.splits


def test_ranges_are_one_request_a_sample_and_its_bytes(shards, front, s3, tmp_path):
    index = load_index(s3.put(shards, "chexpert"), settings(tmp_path))
    front.requests.clear()
    reader = ShardReader(settings(tmp_path, mode="range"))
    found = images(reader, index)
    asked = sum(len(image) + 512 for image in found)
    assert len(front.requests) == 40
    assert reader.counters == ReadCounters(bytes_read=asked, remote_bytes=asked)


def test_the_cache_asks_for_each_shard_once(shards, front, s3, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_reader, "_OPEN_FILES", 2)  # closed and opened again in between
    index = load_index(s3.put(shards, "chexpert"), settings(tmp_path))
    front.requests.clear()
    reader = ShardReader(settings(tmp_path, mode="cache"))
    rows = np.random.default_rng(0).permutation(40).tolist()
    for row in rows:
        read_image(reader, index, "train", row)
    assert len(front.requests) == 5 == reader.counters.cache_misses and reader.counters.cache_hits > 0
    assert reader.counters.remote_bytes == sum(shard.bytes for shard in index.splits["train"].shards)
    again = ShardReader(settings(tmp_path, mode="cache"))  # resumed: nothing comes from the server
    images(again, load_index(index.url, settings(tmp_path)))
    assert again.counters.remote_bytes == 0 == again.counters.cache_misses


def test_auto_keeps_what_fits_in_whole_and_reads_ranges_else(shards, s3, tmp_path):
    index = load_index(s3.put(shards, "chexpert"), settings(tmp_path))
    total = {split: sum(shard.bytes for shard in info.shards) for split, info in index.splits.items()}
    fits = ShardReader(settings(tmp_path / "a", cache_bytes=total["train"]))
    images(fits, index)
    assert fits.counters.cache_misses == 5
    read_image(fits, index, "valid", 0)  # together they don't fit
    assert fits.counters.cache_misses == 5 and fits.counters.cache_hits == 0
    images(fits, index)
    assert fits.counters.cache_misses == 5  # what was kept is still used
    ranges = ShardReader(settings(tmp_path / "b", cache_bytes=total["train"] - 1))
    images(ranges, index)
    assert ranges.counters.cache_misses == 0 and not (tmp_path / "b" / "cache" / "shards").exists()


def test_the_limit_of_the_cache_holds_while_an_epoch_is_read(shards, s3, tmp_path):
    index = load_index(s3.put(shards, "chexpert"), settings(tmp_path))
    largest = max(shard.bytes for shard in index.splits["train"].shards)
    reader = ShardReader(settings(tmp_path, mode="cache", cache_bytes=2 * largest))
    expected = images(ShardReader(), load_index(shards))
    for row in range(40):
        assert read_image(reader, index, "train", row) == expected[row]
        assert sum(path.stat().st_size for path in (tmp_path / "cache" / "shards").iterdir()) <= 2 * largest


def test_a_server_that_dies_is_retried_and_named(shards, s3, tmp_path):
    url = s3.put(shards, "chexpert")
    index, reader = load_index(url, settings(tmp_path)), ShardReader(settings(tmp_path, mode="range"))
    first = read_image(reader, index, "train", 0)
    s3.kill()
    with pytest.raises(StorageError, match=f"{url}/train-00000.*.tar cannot be read after 2 attempts"):
        read_image(reader, index, "train", 1)
    with pytest.raises(StorageError, match=f"{url}/index.json cannot be read after 2 attempts"):
        load_index(url, settings(tmp_path))
    assert reader.counters.retries == 1
    s3.restart()
    assert read_image(reader, index, "train", 0) == first


def test_threads_and_forked_readers_share_a_url(shards, s3, tmp_path):
    index = load_index(s3.put(shards, "chexpert"), settings(tmp_path))
    expected = images(ShardReader(), load_index(shards))
    for mode in ("range", "cache"):
        reader = ShardReader(settings(tmp_path, mode=mode))
        read_image(reader, index, "train", 0)
        right: list[bool] = []

        def read(reader: ShardReader = reader, right: list[bool] = right) -> None:
            right.append(images(reader, index) == expected)

        def child(reader: ShardReader = reader) -> None:
            os._exit(7 if images(reader, index) == expected else 1)

        threads = [threading.Thread(target=read) for _ in range(3)]
        processes = [multiprocessing.get_context("fork").Process(target=child) for _ in range(2)]
        for one in (*threads, *processes):
            one.start()
        for one in (*threads, *processes):
            one.join(60)
        assert right == [True] * 3 and [process.exitcode for process in processes] == [7, 7]


@pytest.mark.parametrize("mode", ["range", "cache"])
def test_a_truncated_shard_behind_a_url_is_refused(shards, s3, tmp_path, mode):
    url = s3.put(shards, "chexpert")
    index = load_index(url, settings(tmp_path))
    row = len(index.table("train")) - 1
    entry = index.table("train")[row]
    name = index.splits["train"].shards[int(entry["shard"])].file
    s3.put_bytes((shards / name).read_bytes()[: int(entry["offset"]) + 5], f"chexpert/{name}")  # after it was opened
    reader = ShardReader(settings(tmp_path, mode=mode))
    with pytest.raises(ValueError, match=f"{url}/{name} ends (inside an image .offset|after)"):
        read_image(reader, index, "train", row)
    with pytest.raises(ValueError, match=f"{url}/{name} is truncated: "):
        load_index(url, settings(tmp_path))


def test_a_shard_of_other_content_behind_a_url_is_refused(shards, s3, tmp_path):
    def rename(file, offset: int) -> None:
        file.seek(offset - 512)
        file.write(b"another")

    spoiled = spoil(shards, tmp_path / "spoiled", 3, rename)
    url = s3.put(spoiled.folder, "chexpert")
    index = load_index(url, settings(tmp_path))
    with pytest.raises(ValueError, match=f"{url}/train-.* does not hold chexpert-.* at offset"):
        read_image(ShardReader(settings(tmp_path, mode="range")), index, "train", 3)
    with pytest.raises(ValueError, match=f"{url}/train-.*sha256 differs"):
        read_image(ShardReader(settings(tmp_path, mode="cache")), index, "train", 3)


def test_what_is_missing_behind_a_url_is_named(shards, s3, tmp_path):
    url = s3.put(shards, "chexpert")
    index, client = load_index(url, settings(tmp_path)), s3.client
    client.delete_object(Bucket="shards", Key="chexpert/train-000000.tar")
    row = int(np.flatnonzero(index.table("train")["shard"] == 0)[0])
    for mode in ("range", "cache"):
        with pytest.raises(MissingObject, match=f"{url}/train-000000.tar is missing"):
            read_image(ShardReader(settings(tmp_path, mode=mode)), index, "train", row)
    with pytest.raises(ValueError, match=f"{url}/train-000000.tar is missing"):
        load_index(url, settings(tmp_path))
    s3.put(shards, "chexpert")
    client.delete_object(Bucket="shards", Key="chexpert/samples-valid.npy")
    with pytest.raises(ValueError, match=f"{url}/samples-valid.npy is missing"):
        load_index(url, settings(tmp_path))
    for absent in ("s3://shards/nothing", "s3://no-such-bucket/chexpert"):
        with pytest.raises(ValueError, match=f"{absent}/index.json does not exist: .* another bucket"):
            load_index(absent, settings(tmp_path))


def test_a_changed_index_is_noticed_and_its_tables_are_fetched_once(shards, s3, front, tmp_path):
    url = s3.put(shards, "chexpert")
    first = load_index(url, settings(tmp_path))
    front.requests.clear()
    again = load_index(url, settings(tmp_path))
    assert again.folder == first.folder
    assert [request.split("?")[0] for request in front.requests if "list-type" not in request] == [
        *("HEAD /shards/chexpert/index.json", "GET /shards/chexpert/index.json")
    ]
    assert len(front.requests) == 3  # one listing for all shards
    content = json.loads((shards / "index.json").read_text())
    content["licence"] = "changed"
    s3.put_bytes(json.dumps(content).encode(), "chexpert/index.json")
    changed = load_index(url, settings(tmp_path))
    assert changed.licence == "changed" and changed.folder != first.folder and changed.digest != first.digest


def test_a_table_that_is_not_the_one_of_the_index_is_refused(shards, s3, tmp_path):
    url = s3.put(shards, "chexpert")
    data = bytearray((shards / "samples-train.npy").read_bytes())
    data[-1] ^= 1
    s3.put_bytes(bytes(data), "chexpert/samples-train.npy")
    with pytest.raises(ValueError, match=f"{url}/samples-train.npy is damaged or of another index"):
        load_index(url, settings(tmp_path))


@pytest.mark.parametrize("name", ["../x.tar", "/etc/passwd", "a/../../x.tar", "..", "a/b.tar"])
def test_a_hostile_index_behind_a_url_writes_and_reads_nothing_outside(shards, s3, tmp_path, name):
    url = s3.put(shards, "chexpert")
    for key in ("table", "shard"):
        content = json.loads((shards / "index.json").read_text())
        train = content["splits"]["train"]
        if key == "table":
            train["table"] = name
        else:
            train["shards"][0]["file"] = name
        s3.put_bytes(json.dumps(content).encode(), "chexpert/index.json")
        with pytest.raises(ValueError, match=f"{url}/index.json names the file .* not a plain name"):
            load_index(url, settings(tmp_path))
        assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*.*"))


@pytest.mark.parametrize("mode", ["range", "cache"])
def test_a_folder_behind_a_web_server_is_read_too(shards, s3, tmp_path, mode):
    """It gives no listing, so each file is asked for."""
    s3.put(shards, "chexpert")
    s3.client.put_bucket_acl(Bucket="shards", ACL="public-read")
    for path in shards.glob("*.*"):
        s3.client.put_object_acl(Bucket="shards", Key=f"chexpert/{path.name}", ACL="public-read")
    url = f"{s3.endpoint}/shards/chexpert"
    index = load_index(url, settings(tmp_path))
    assert images(ShardReader(settings(tmp_path, mode=mode)), index) == images(ShardReader(), load_index(shards))
    s3.client.delete_object(Bucket="shards", Key="chexpert/train-000001.tar")
    with pytest.raises(ValueError, match=f"{url}/train-000001.tar is missing"):
        load_index(url, settings(tmp_path))


def test_a_web_server_without_ranges_is_refused(shards, tmp_path):
    handler = partial(SimpleHTTPRequestHandler, directory=str(shards))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        index = load_index(f"http://127.0.0.1:{server.server_address[1]}", settings(tmp_path))
        with pytest.raises(ValueError, match=r"train-00000.\.tar: the server ignores ranges of bytes; copy the folder"):
            read_image(ShardReader(settings(tmp_path, mode="range")), index, "train", 0)
        images(ShardReader(settings(tmp_path, mode="cache")), index)  # small ones are whole in one answer
        server.shutdown()


def test_a_reader_that_is_gone_leaves_no_file_open(tmp_path):
    path = tmp_path / "shard.tar"
    path.write_bytes(b"x" * 100)

    def kept() -> int:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return sum(os.readlink(link) == str(path) for link in links if link.exists())

    reader = ShardReader()
    reader.read(str(path), 10, 20)
    assert kept() == 1
    for _ in range(5):
        assert ShardReader().read(str(path), 10, 20) == b"x" * 20
    gc.collect()
    assert kept() == 1
    del reader
    gc.collect()
    assert kept() == 0

"""Files behind URLs: a real S3 server that misses, refuses, stumbles, falls silent and dies."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest

from scaletransfer import storage
from scaletransfer.storage_errors import MissingObject, StorageError
from scaletransfer.storage_settings import ReadCounters, RemoteSettings

pytest_plugins = ("helpers_s3",)
QUICK = RemoteSettings(attempts=3, timeout=5)
DATA = bytes(range(256)) * 100


def sentence(error: pytest.ExceptionInfo[ValueError]) -> str:
    text = str(error.value)
    assert "\n" not in text and not text.endswith(".")
    return text


def test_what_is_there_is_read_in_whole_and_in_parts(s3, tmp_path):
    url = s3.put_bytes(DATA, "folder/a.bin")
    s3.put_bytes(b"deeper", "folder/sub/b.bin")
    counters = ReadCounters()
    assert storage.size(url) == len(DATA) and storage.exists(url)
    assert storage.read_bytes(url, QUICK, counters) == DATA
    assert storage.read_range(url, 300, 50, QUICK, counters) == DATA[300:350]
    assert storage.read_range(url, len(DATA) - 5, 50) == DATA[-5:]  # what there is of it
    assert storage.read_range(url, len(DATA) + 5, 50) == b""
    storage.download(url, tmp_path / "copy", QUICK, counters)
    assert (tmp_path / "copy").read_bytes() == DATA
    assert counters == ReadCounters(remote_bytes=2 * len(DATA) + 50)
    assert storage.sizes("s3://shards/folder/") == {"a.bin": len(DATA)}  # no folders
    assert storage.sizes("s3://shards/nothing") == {} == storage.sizes("s3://no-such-bucket/x")
    assert not storage.exists("s3://shards/folder") and not storage.exists("s3://shards/folder/z")


@pytest.mark.parametrize("scheme", ["s3", "file"])
def test_what_is_written_replaces_what_was_there(s3, tmp_path, scheme):
    base = "s3://shards/made" if scheme == "s3" else f"file://{tmp_path}/made"
    (tmp_path / "local").write_bytes(DATA)
    url = storage.join(base, "x.bin")
    storage.write_bytes(b"old", url)
    storage.upload(tmp_path / "local", url)
    assert storage.read_bytes(url) == DATA
    storage.write_bytes(b"new", url)
    assert storage.read_bytes(url) == b"new" and storage.sizes(base) == {"x.bin": 3}
    storage.remove(url)
    storage.remove(url)
    assert not storage.exists(url)


def test_a_listing_is_never_an_old_one(s3):
    assert storage.sizes("s3://shards/grows") == {}
    url = s3.put_bytes(b"1", "grows/a")
    assert storage.sizes("s3://shards/grows") == {"a": 1}
    s3.put_bytes(b"22", "grows/a")
    assert storage.sizes("s3://shards/grows") == {"a": 2} and storage.size(url) == 2


@pytest.mark.parametrize("url", ["s3://shards/no/such", "s3://no-such-bucket/a"])
def test_a_missing_object_or_bucket_is_not_tried_again(front, url):
    for call in (storage.size, storage.read_bytes, lambda u: storage.read_range(u, 0, 5)):
        front.requests.clear()
        with pytest.raises(MissingObject, match="is missing: check the bucket") as error:
            call(url)
        assert sentence(error).startswith(url) and len(front.requests) <= 2  # the second looks for a folder


def test_a_refusal_is_not_tried_again(s3, front):
    url = s3.put_bytes(DATA, "secret")
    front.faults = ["403"]
    with pytest.raises(ValueError, match=r"the server refuses it .*: check the credentials") as error:
        storage.read_bytes(url)
    assert sentence(error).startswith(url) and len(front.requests) <= 2


@pytest.mark.parametrize("fault", ["503", "500", "cut"])
def test_a_stumbling_server_is_asked_again(s3, front, fault):
    url = s3.put_bytes(DATA, "a")
    counters = ReadCounters()
    front.faults = [fault, fault]
    assert storage.read_range(url, 1000, 500, QUICK, counters) == DATA[1000:1500]
    assert counters == ReadCounters(remote_bytes=500, retries=2)
    assert len(front.requests) == 3  # nobody else below repeats requests
    front.faults = [fault] * 3
    with pytest.raises(ValueError, match="cannot be read after 3 attempts") as error:
        storage.read_range(url, 0, 500, QUICK, counters)
    assert sentence(error).startswith(url) and counters.retries == 4 and len(front.requests) == 6


def test_a_stumbling_web_server_is_asked_again(s3, front):
    s3.put_bytes(DATA, "a")
    s3.client.put_bucket_acl(Bucket="shards", ACL="public-read")
    s3.client.put_object_acl(Bucket="shards", Key="a", ACL="public-read")
    url, counters = f"{front.endpoint}/shards/a", ReadCounters()
    front.faults = ["503", "cut"]
    assert storage.read_range(url, 1000, 500, QUICK, counters) == DATA[1000:1500] and counters.retries == 2
    front.requests.clear()
    front.faults = ["403"]
    with pytest.raises(StorageError, match="the server refuses it"):
        storage.read_bytes(url, QUICK)
    with pytest.raises(MissingObject):
        storage.read_bytes(f"{url}/none", QUICK)
    assert len(front.requests) == 2 and storage.read_range(url, len(DATA) + 5, 50) == b""


def test_a_download_goes_on_where_the_connection_broke(s3, front, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_CHUNK", 10_000)
    url = s3.put_bytes(DATA, "a")
    front.faults = ["", "cut", "", "503"]
    seen: list[bytes] = []
    storage.download(url, tmp_path / "copy", QUICK, bytes=len(DATA), seen=seen.append)
    assert (tmp_path / "copy").read_bytes() == DATA == b"".join(seen)
    assert [request.split("bytes=")[1] for request in front.requests] == [
        *("0-9999", "10000-19999", "10000-19999", "20000-25599", "20000-25599")
    ]


def test_the_pauses_grow(s3, front, monkeypatch):
    url = s3.put_bytes(DATA, "a")
    pauses: list[float] = []
    monkeypatch.undo()  # the pauses as they are; the environment below again
    for name, value in {**s3.environment, "AWS_ENDPOINT_URL": front.endpoint}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    front.faults = ["503"] * 9
    assert storage.read_range(url, 0, 5, RemoteSettings(attempts=10)) == DATA[:5]
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_a_dead_server_is_given_up_and_one_that_comes_back_is_found(s3):
    url = s3.put_bytes(DATA, "a")
    counters = ReadCounters()
    assert storage.read_range(url, 0, 5, QUICK, counters) == DATA[:5]
    s3.kill()
    with pytest.raises(StorageError, match=r"after 3 attempts \(Could not connect.*AWS_ENDPOINT_URL") as error:
        storage.read_range(url, 0, 5, QUICK, counters)
    assert sentence(error).startswith(url) and counters.retries == 2
    for call in (storage.size, storage.exists, storage.sizes):
        with pytest.raises(ValueError, match="after 3 attempts"):
            call(url, QUICK)

    def again() -> None:
        s3.start()
        s3.put_bytes(DATA, "a")

    back = threading.Timer(0.3, again)
    back.start()
    patient = RemoteSettings(attempts=12, timeout=5)
    end = time.monotonic() + 30
    while True:  # the server may answer before the object is there again
        try:
            assert storage.read_range(url, 0, 5, patient, counters) == DATA[:5]
            break
        except MissingObject:
            assert time.monotonic() < end
            time.sleep(0.01)
    back.join()
    assert counters.retries > 2


def test_a_silent_server_does_not_hang_the_reader(s3):
    url = s3.put_bytes(DATA, "a")
    storage.size(url, RemoteSettings(attempts=2, timeout=0.5))
    s3.pause()
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"after 2 attempts \(") as error:
        storage.read_range(url, 0, 5, RemoteSettings(attempts=2, timeout=0.5))
    assert time.monotonic() - began < 4
    s3.go_on()
    assert sentence(error).startswith(url)
    assert storage.read_range(url, 0, 5, RemoteSettings(attempts=2, timeout=0.5)) == DATA[:5]


def test_without_credentials_the_sentence_says_so(s3, monkeypatch):
    url = s3.put_bytes(DATA, "a")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    storage.forget()
    with pytest.raises(ValueError, match=f"{url} .* without credentials .*: set AWS_ACCESS_KEY_ID"):
        storage.read_bytes(url)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("simplecache::s3://shards/a", "not a plain URL"),
        ("zip://a.tar::s3://shards/b.zip", "not a plain URL"),
        ("pipe://cat", "not a plain URL"),
        ("reference://x/y", "not a plain URL"),
        ("pipe:ls|sh://x", "not a plain URL"),
        ("unheard://x/y", "cannot be opened"),
    ],
)
def test_other_urls_are_refused(url, says):
    for call in (storage.read_bytes, storage.sizes, lambda u: storage.write_bytes(b"", u)):
        with pytest.raises(ValueError, match=says) as error:
            call(url)
        assert sentence(error).startswith(url)


def test_a_password_in_a_url_is_not_repeated():
    with pytest.raises(ValueError, match="after 1 attempt ") as error:
        storage.read_bytes("http://me:hidden@127.0.0.1:9/a", RemoteSettings(attempts=1))
    assert "hidden" not in sentence(error).split(" cannot")[0]
    with pytest.raises(ValueError, match="after 1 attempt "):
        storage.exists("http://127.0.0.1:9/a", RemoteSettings(attempts=1))  # not "no": nobody was asked


def test_without_s3fs_the_sentence_says_what_to_install(tmp_path):
    (tmp_path / "s3fs.py").write_text("raise ImportError('absent')\n")
    code = "from scaletransfer import storage; storage.read_bytes('s3://a/b')"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], check=False, env=environment, capture_output=True, text=True)
    assert 'ValueError: s3://a/b needs a library that is not installed: pip install "scaletransfer[s3]"' in done.stderr


def test_nothing_is_imported_before_a_url_is_read():
    code = (
        "import sys; import scaletransfer.shard_reader; "
        "print([name for name in ('fsspec', 's3fs', 'aiohttp', 'torch') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_threads_and_forked_processes_read_at_once(s3):
    url = s3.put_bytes(DATA, "a")
    wrong: list[int] = []

    def read(number: int) -> None:
        for offset in range(number, number + 20):
            if storage.read_range(url, offset, 30) != DATA[offset : offset + 30]:
                wrong.append(offset)

    def child() -> None:
        read(100)
        os._exit(1 if wrong else 7)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    forked = [multiprocessing.get_context("fork").Process(target=child) for _ in range(2)]  # while the others read
    for process in forked:
        process.start()
    for running in (*threads, *forked):
        running.join(60)
    assert not wrong and [process.exitcode for process in forked] == [7, 7]

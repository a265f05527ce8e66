"""Files behind URLs (`s3://bucket/folder`, `https://...`, `file:///...`): what fsspec reaches, with retries.

A request that fails because of the network or a busy server is tried again after 0.5, 1, 2, ... seconds; a missing
object or a refused permission is not.  What remains is one sentence that names the URL.  Credentials and servers come
from where the storage's own library takes them (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `~/.aws`, ...; fsspec's
`FSSPEC_S3_ANON=true` reads public buckets without credentials).
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from scaletransfer.storage_errors import (
    DiskFull,
    MissingObject,
    StorageError,
    hidden,
    is_beyond_end,
    is_storage,
    is_transient,
    sentence,
    shown,
)
from scaletransfer.storage_settings import ReadCounters, RemoteSettings

Result = TypeVar("Result")
_FIRST_PAUSE = 0.5  # seconds before the second attempt; doubled for each further one
_LONGEST_PAUSE = 30.0
_CONNECT = 10.0  # seconds that a connection may take
_SILENCE = 20.0  # seconds without a byte after which a server counts as dead
_CHUNK = 8 * 1024 * 1024  # bytes of a download that one request asks for
_SLOW = 128 * 1024  # bytes a second; an upload may take as long as this needs
_LONGEST_LISTING = 3600.0  # seconds
_CONNECTIONS = 64
_THREADS = 16
# They hold other URLs or commands inside, or write where nobody asked; shards need none of them.
_REFUSED = {"abfss+cached", "async_wrapper", "blockcache", "cached", "data", "dir", "filecache", "generic", "jlab"}
_REFUSED |= {"jupyter", "libarchive", "pipe", "reference", "simplecache", "tar", "zip"}
_EXTRAS = {"s3": 'pip install "scaletransfer[s3]"', "s3a": 'pip install "scaletransfer[s3]"'}


DEFAULT = RemoteSettings()
_filesystems: dict[Any, Any] = {}
_abandoned: list[Any] = []
_lock = threading.Lock()


def forget() -> None:
    """Connect anew from here on: after a fork, or where servers or credentials have changed."""
    _abandoned.extend(_filesystems.values())  # collecting them would close connections that may be another process's
    _filesystems.clear()


def _after_fork() -> None:
    global _lock  # noqa: PLW0603 - a lock that a thread of the parent held would stay held
    _lock = threading.Lock()
    forget()


os.register_at_fork(after_in_child=_after_fork)


def is_url(text: str | os.PathLike[str]) -> bool:
    """Whether this names something by URL; `file:///...` does."""
    return "://" in os.fspath(text)


def join(url: str, name: str) -> str:
    """The URL of `name` in the folder `url`."""
    return f"{url.rstrip('/')}/{name}"


def local_path(url: str) -> str | None:
    """The path that a `file://` or `local://` URL stands for; None for any other."""
    if url.partition("://")[0] not in ("file", "local"):
        return None
    from fsspec.implementations.local import LocalFileSystem

    return str(LocalFileSystem._strip_protocol(url))


def size(url: str, remote: RemoteSettings = DEFAULT, counters: ReadCounters | None = None) -> int:
    """Bytes of the object.

    Raises (as every function here): ValueError, in one sentence that names the URL, for an object that is missing,
    for missing libraries or credentials, and for a server that does not answer `remote.attempts` times.
    """

    def call(fs: Any) -> int:
        info = _finished(fs, "info", url, remote.timeout)
        if info.get("type") == "directory" or info.get("size") is None:
            raise FileNotFoundError(url)
        return int(info["size"])

    return _attempt(call, url, "be found", remote, counters)


def exists(url: str, remote: RemoteSettings = DEFAULT) -> bool:
    """Whether there is an object of this URL (a folder is none)."""

    def call(fs: Any) -> bool:
        try:
            return bool(_finished(fs, "info", url, remote.timeout).get("type") != "directory")
        except FileNotFoundError as error:
            if hidden(error) is not None:
                raise
            return False

    return _attempt(call, url, "be looked for", remote, None)


def sizes(url: str, remote: RemoteSettings = DEFAULT) -> dict[str, int]:
    """Name -> bytes of the objects directly in the folder `url`, by one listing; empty if there is no such folder."""

    def call(fs: Any) -> dict[str, int]:
        try:
            found = _finished(fs, "ls", url, remote.timeout, detail=True)
        except FileNotFoundError as error:
            if hidden(error) is not None:
                raise
            return {}
        files = [entry for entry in found if entry.get("type") == "file" and entry.get("size") is not None]
        return {str(entry["name"]).rstrip("/").rpartition("/")[2]: int(entry["size"]) for entry in files}

    return _attempt(call, url, "be listed", remote, None)


def sizes_of(url: str, names: Sequence[str], remote: RemoteSettings = DEFAULT) -> dict[str, int]:
    """Name -> bytes of those of the objects in the folder `url` that there are: by one listing, where there is one."""
    if not url.startswith(("http://", "https://")):
        there = sizes(url, remote)
        return {name: there[name] for name in names if name in there}

    def one(name: str) -> int | None:
        return size(join(url, name), remote) if exists(join(url, name), remote) else None

    with ThreadPoolExecutor(_THREADS) as pool:
        return {name: found for name, found in zip(names, pool.map(one, names), strict=True) if found is not None}


def list_files(url: str, remote: RemoteSettings = DEFAULT) -> dict[str, tuple[int, str]]:
    """{"train/a.jpg" -> (bytes, text that changes with the object)} of all below the folder `url`, by one listing."""

    def call(fs: Any) -> dict[str, tuple[int, str]]:
        base = str(fs._strip_protocol(url)).strip("/")
        try:
            # a million objects are a thousand requests
            found = _finished(fs, "find", url, max(remote.timeout, _LONGEST_LISTING), detail=True)
        except FileNotFoundError as error:
            if hidden(error) is not None:
                raise
            return {}
        files = {}
        for path, entry in found.items():
            name = str(path).strip("/")
            if entry.get("type") != "file" or str(path).endswith("/") or not name.startswith(f"{base}/"):
                continue
            tag = next((entry[key] for key in ("ETag", "etag", "mtime", "LastModified") if entry.get(key)), "")
            files[name[len(base) + 1 :]] = int(entry["size"]), str(tag).strip('"')
        return files

    return _attempt(call, url, "be listed", remote, None)


def read_bytes(url: str, remote: RemoteSettings = DEFAULT, counters: ReadCounters | None = None) -> bytes:
    """The whole object; for small ones (an index, say)."""
    data = _attempt(lambda fs: _finished(fs, "cat_file", url, remote.timeout), url, "be read", remote, counters)
    count(counters, remote_bytes=len(data))
    return data


def read_range(
    url: str, offset: int, size: int, remote: RemoteSettings = DEFAULT, counters: ReadCounters | None = None
) -> bytes:
    """`size` bytes from `offset` on by one request; fewer where the object ends before."""

    def call(fs: Any) -> bytes:
        try:
            return _finished(fs, "cat_file", url, remote.timeout, start=offset, end=offset + size)
        except Exception as error:
            if is_beyond_end(error):
                return b""
            raise

    data = _attempt(call, url, "be read", remote, counters)
    if len(data) > size:
        raise ValueError(f"{shown(url)}: the server ignores ranges of bytes; copy the folder to a disk and name that")
    count(counters, remote_bytes=len(data))
    return data


def download(
    url: str,
    path: str | os.PathLike[str],
    remote: RemoteSettings = DEFAULT,
    counters: ReadCounters | None = None,
    *,
    bytes: int | None = None,
    seen: Callable[[bytes], None] | None = None,
) -> None:
    """Copy the object into the file `path` (made, or overwritten in place: give a temporary name and rename it).

    One request for 8 MiB, so that a lost connection costs little.  `bytes`: its size, where that is known; `seen` is
    given each piece in order (a hash's `update`).  Raises `DiskFull` (a ValueError) where the disk is.
    """
    total = size(url, remote, counters) if bytes is None else bytes
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb", buffering=0) as file:
            os.truncate(file.fileno(), total)
            done = 0
            while done < total:
                piece = read_range(url, done, min(_CHUNK, total - done), remote, counters)
                if not piece:
                    raise ValueError(
                        f"{shown(url)} ends after {done} bytes where {total} were expected: it was replaced or is "
                        "truncated; copy the folder there again"
                    )
                for start in range(0, len(piece), _CHUNK):
                    file.write(piece[start : start + _CHUNK])
                if seen is not None:
                    seen(piece)
                done += len(piece)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (DiskFull if full else ValueError)(
            f"{shown(url)} cannot be copied to {os.fspath(path)} ({error.strerror or error}): "
            f"{'free some space there' if full else 'check that folder'}"
        ) from error


def upload(path: str | os.PathLike[str], url: str, remote: RemoteSettings = DEFAULT) -> None:
    """Copy the file `path` to `url`; no reader sees half of it.  A file that is there is replaced."""
    local = local_path(url)
    if local is not None:
        _copy(os.fspath(path), local)
        return
    limit = max(remote.timeout, os.path.getsize(path) / _SLOW)

    def call(fs: Any) -> None:
        _finished(fs, "put_file", url, limit, before=(os.fspath(path),))

    _attempt(call, url, "be written", remote, None)


def write_bytes(data: bytes, url: str, remote: RemoteSettings = DEFAULT) -> None:
    """Make the object `url` of these bytes; no reader sees half of it.  One that is there is replaced."""
    local = local_path(url)
    if local is not None:
        _write(data, local)
        return
    _attempt(lambda fs: _finished(fs, "pipe_file", url, remote.timeout, after=(data,)), url, "be written", remote, None)


def remove(url: str, remote: RemoteSettings = DEFAULT) -> None:
    """Delete the object; it may be absent."""

    def call(fs: Any) -> None:
        with suppress(FileNotFoundError):
            _finished(fs, "rm_file", url, remote.timeout)

    _attempt(call, url, "be deleted", remote, None)


def _attempt(
    call: Callable[[Any], Result], url: str, what: str, remote: RemoteSettings, counters: ReadCounters | None
) -> Result:
    fs = _filesystem(url, remote)
    for attempt in range(1, remote.attempts + 1):
        try:
            return call(fs)
        except Exception as caught:
            if not is_storage(caught):
                raise
            error = hidden(caught) or caught
            if attempt == remote.attempts or not is_transient(error):
                kind = MissingObject if isinstance(error, FileNotFoundError) else StorageError
                raise kind(sentence(error, url, what, attempt)) from error
        count(counters, retries=1)
        time.sleep(min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (attempt - 1)))
    raise AssertionError("remote.attempts is less than 1")


def _finished(
    fs: Any, name: str, url: str, timeout: float, *, before: Any = (), after: Any = (), **options: Any
) -> Any:
    """Call a method of the file system with the path between `before` and `after`; one that takes longer than
    `timeout` seconds is a TimeoutError."""
    path = fs._strip_protocol(url)
    if not getattr(fs, "async_impl", False):
        return getattr(fs, name)(*before, path, *after, **options)
    from fsspec.asyn import sync

    return sync(fs.loop, getattr(fs, f"_{name}"), *before, path, *after, timeout=timeout, **options)


def _filesystem(url: str, remote: RemoteSettings) -> Any:
    """The file system of a URL, one a process and kind of settings; threads share it."""
    protocol = url.partition("://")[0].lower()
    known = (protocol, remote.timeout)
    with _lock:
        if known not in _filesystems:
            _filesystems[known] = _connect(url, protocol, remote.timeout)
        return _filesystems[known]


def _connect(url: str, protocol: str, timeout: float) -> Any:
    import fsspec

    if "::" in url or protocol in _REFUSED or not re.fullmatch(r"[a-z][a-z0-9+.-]*", protocol):
        raise ValueError(
            f"{shown(url)} is not a plain URL of one file or folder; copy it where s3:// or https:// reach"
        )
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    silence = min(timeout, _SILENCE)
    if protocol in ("s3", "s3a"):
        options["config_kwargs"] = {
            "connect_timeout": min(timeout, _CONNECT),
            "read_timeout": silence,
            "max_pool_connections": _CONNECTIONS,
            "retries": {"total_max_attempts": 1},  # ours count
        }
    try:
        if protocol in ("http", "https"):
            options["client_kwargs"] = {"timeout": _http_timeout(timeout, silence)}
        fs = fsspec.filesystem(protocol, **options)
    except ImportError as error:
        mend = _EXTRAS.get(protocol, f"install it ({error})")
        raise ValueError(f"{shown(url)} needs a library that is not installed: {mend}") from error
    except ValueError as error:
        raise ValueError(f"{shown(url)} cannot be opened ({error}): give a path, s3://, https:// or file://") from error
    if protocol in ("s3", "s3a"):
        fs.retries = 1
    return fs


def _http_timeout(timeout: float, silence: float) -> Any:
    import aiohttp

    return aiohttp.ClientTimeout(total=timeout, sock_connect=min(timeout, _CONNECT), sock_read=silence)


def count(counters: ReadCounters | None, **more: int) -> None:
    """Add to counters by name; threads may."""
    if counters is not None:
        with _lock:
            for name, value in more.items():
                setattr(counters, name, getattr(counters, name) + value)


def _copy(path: str, target: str) -> None:
    import shutil

    os.makedirs(os.path.dirname(target), exist_ok=True)
    temporary = f"{target}.{os.getpid()}.tmp"
    shutil.copyfile(path, temporary)
    _publish(temporary, target)


def _write(data: bytes, target: str) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    temporary = f"{target}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
    _publish(temporary, target)


def _publish(temporary: str, target: str) -> None:
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)

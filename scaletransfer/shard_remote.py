"""Shards behind a URL: each is written on a disk of this machine, stored when it is finished, and removed here.

What a folder's work folder holds of a build lies behind the URL too, so that another machine can go on, or make other
parts.  A marker goes there after its shard, the index at the very end.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scaletransfer import storage
from scaletransfer.files import cache_folder, drop_if_empty, json_bytes
from scaletransfer.index import INDEX_NAME, ShardIndex, load_index
from scaletransfer.mirrors import reaching
from scaletransfer.shard_output import INFO_NAME, Output, Part
from scaletransfer.shard_writer import WORK_FOLDER, ShardTask, finished
from scaletransfer.storage_errors import MissingObject, shown

_RANGE = f"{WORK_FOLDER}/range.json"
_REQUESTS = 16
"""Small files that are read or removed at once."""
_UPLOADS = 4
"""Shards that are stored at once; as many again may wait on the disk before no more are written."""
_NAME_LENGTH = 20  # hex digits of the URL's hash


def open_output(place: str | Path, staging: Path | None = None) -> Output:
    """What `place` names, a folder or a URL.  staging: of a `RemoteOutput`; ValueError if it is given for a folder."""
    if storage.is_url(place):
        return RemoteOutput(str(place), staging)
    if staging is not None:
        raise ValueError(f"--staging is for an --out with a URL, such as s3://bucket/folder, and --out is {place}")
    return Output(Path(place))


class RemoteOutput(Output):
    """A folder for shards behind a URL.

    staging: a folder of this machine, in which shards lie while they are written (default: one in the cache folder); a
    sub-folder of it belongs to this URL.  Storage that does not answer is a ConnectionError here.
    """

    def __init__(self, url: str, staging: Path | None = None) -> None:
        self.url = url.rstrip("/")
        base = staging if staging is not None else cache_folder() / "staging"
        super().__init__(base / hashlib.sha256(self.url.encode()).hexdigest()[:_NAME_LENGTH])
        self._sizes: dict[str, int] = {}

    def __str__(self) -> str:
        return shown(self.url)

    def names(self) -> list[str]:
        with reaching():
            self._sizes = storage.sizes(self.url)
            work = storage.sizes(storage.join(self.url, WORK_FOLDER))
        self._sizes |= {f"{WORK_FOLDER}/{name}": size for name, size in work.items()}
        return sorted(self._sizes)

    def read(self, name: str) -> bytes | None:
        try:
            with reaching():
                return storage.read_bytes(self._place(name))
        except ConnectionError as error:
            if isinstance(error.__cause__, MissingObject):
                return None
            raise

    def write(self, name: str, data: bytes) -> None:
        with reaching():
            storage.write_bytes(data, self._place(name))

    def remove(self, names: Iterable[str]) -> None:
        names = list(names)
        heads = [name for name in names if name in (INDEX_NAME, INFO_NAME)]
        with reaching(), ThreadPoolExecutor(_REQUESTS) as pool:
            for name in heads:
                storage.remove(self._place(name))
            others = (name for name in names if name not in heads)
            list(pool.map(lambda name: storage.remove(self._place(name)), others))
        local = storage.local_path(self.url)
        if local is not None:
            drop_if_empty(Path(local) / WORK_FOLDER)

    def done(
        self, tasks: Sequence[ShardTask], threads: int, progress: Callable[[int], object]
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """As of a local folder, but that of what is stored the sizes alone are compared.

        Shards that were finished here and not stored any more are stored.
        """
        there = set(self.names())
        contents, damaged = {}, []
        with ThreadPoolExecutor(_REQUESTS) as pool, self.storing() as store:
            for task, content in zip(tasks, pool.map(lambda task: self._marker(task, there), tasks), strict=True):
                if content is None and (content := finished(task)) is not None:
                    store(task, content)
                if content is not None:
                    contents[task.file] = content
                    progress(len(task.samples))
                elif _marker_of(task) in there:
                    damaged.append(task.file)
        return contents, damaged

    @contextmanager
    def storing(self) -> Iterator[Callable[[ShardTask, dict[str, Any]], None]]:
        running: set[Future[None]] = set()

        def store(task: ShardTask, content: dict[str, Any]) -> None:
            nonlocal running
            running.add(pool.submit(self._store, task, content))
            if len(running) >= 2 * _UPLOADS:  # else the disk would fill where the network is slow
                stored, running = wait(running, return_when=FIRST_COMPLETED)
                for future in stored:
                    future.result()

        with ThreadPoolExecutor(_UPLOADS) as pool:
            yield store
            for future in running:
                future.result()

    def publish(self, names: Sequence[str]) -> None:
        with reaching():
            for name in names:
                storage.upload(self.folder / name, self._place(name))

    def index(self) -> ShardIndex:
        with reaching():
            return load_index(self.url)

    def known_range(self) -> int | None:
        try:
            return int(json.loads(self.read(_RANGE) or b"null")["white"])
        except (ValueError, KeyError, TypeError):
            return None

    def keep_range(self, white: int) -> None:
        self.write(_RANGE, json_bytes({"white": white}))

    def clean(self, part: Part | None = None) -> None:
        if part is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            drop_if_empty(self.folder.parent)
        else:  # other parts may be written here
            (self.folder / WORK_FOLDER / f"{part.name}.lock").unlink(missing_ok=True)

    def _place(self, name: str) -> str:
        return storage.join(self.url, name)

    def _marker(self, task: ShardTask, there: set[str]) -> dict[str, Any] | None:
        """The stored marker, if its shard is there and of its size."""
        if _marker_of(task) not in there:
            return None
        try:
            content: dict[str, Any] = json.loads(self.read(_marker_of(task)) or b"null")
            intact = not content["samples"] or self._sizes.get(task.file) == content["bytes"]
            return content if intact and content["range"] == task.encoding.pixel_max else None
        except (ValueError, KeyError, TypeError):
            return None

    def _store(self, task: ShardTask, content: dict[str, Any]) -> None:
        with reaching():
            if content["samples"]:
                storage.upload(task.folder / task.file, self._place(task.file))
            storage.upload(task.marker, self._place(_marker_of(task)))
        task.marker.unlink()
        (task.folder / task.file).unlink(missing_ok=True)


def _marker_of(task: ShardTask) -> str:
    return f"{WORK_FOLDER}/{task.file}.json"

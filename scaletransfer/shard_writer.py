"""Write planned shards, in this process or in several; each is there in full, with its marker, or not."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import tarfile
import threading
from collections.abc import Callable, Generator, Sequence, Sized
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, Protocol

from scaletransfer.files import json_bytes, sync_folder, write_atomically
from scaletransfer.image_files import read_image
from scaletransfer.sample_table import TOKEN_SEPARATOR
from scaletransfer.shard_image import Encoding, UnusableImage, prepare
from scaletransfer.shard_plan import Plan, Sample

WORK_FOLDER = ".make_shards"
"""In the output folder while it is being made: the plan's hash, a lock, a marker a finished shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """One shard to write; picklable."""

    folder: Path
    file: str
    split: str
    first_row: int
    root: Path
    extension: str
    encoding: Encoding
    label_kind: str
    samples: Sequence[Sample]

    @property
    def marker(self) -> Path:
        """The file that says that this shard is finished."""
        return self.folder / WORK_FOLDER / f"{self.file}.json"


def shard_tasks(plan: Plan, folder: Path) -> list[ShardTask]:
    """The tasks of a plan, in the order of the shards."""
    return [
        ShardTask(
            folder=folder,
            file=file,
            split=split,
            first_row=start,
            root=plan.root,
            extension=plan.extension,
            encoding=plan.encoding,
            label_kind=plan.label_kind,
            samples=plan.samples[split][start:end],
        )
        for split, file, start, end in plan.shards()
    ]


def label_member(sample: Sample, kind: str) -> tuple[str, bytes]:
    """(extension, content) of the member that follows the image.

    Multi-class: `cls`, the class index in ASCII.  Multi-label: `json`, always the same keys, never null:
    other readers infer types from the first samples and break on a null or a mixed type. `kind`: "states", "tokens"
    (the list as one string, in the order of the data set's table) or "classes".
    """
    if isinstance(sample.labels, int):
        return "cls", str(sample.labels).encode("ascii")
    content: dict[str, Any] = {"patient": sample.patient, "view": sample.view}
    if kind == "tokens":
        content["tokens"] = TOKEN_SEPARATOR.join(str(token) for token in sample.labels)
    else:
        content["labels"] = list(sample.labels)
    return "json", json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")


def member(name: str, size: int) -> tarfile.TarInfo:
    """Header of a tar member; nothing of machine or day goes in, so that equal samples give equal bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o444, 0
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


def write_shard(task: ShardTask, progress: Callable[[int], object] | None = None) -> dict[str, Any]:
    """Write one shard: temporary file, fsync, rename, then its marker, whose content is returned.

    The marker: {file, samples, bytes, sha256, rows [[row of the plan, offset, size]], quarantine [[key,
    reason]], seen {"<channels>x<bits>": images}, pixel_max, range}.  If no image is usable, no tar is written and
    bytes is 0. `progress` is called with 1 after every sample.  Raises ValueError for an image that the
    options can't store, OSError for a file that can't be read or written.
    """
    temporary = task.folder / f"{task.file}.tmp"
    rows: list[list[int]] = []
    quarantine: list[list[str]] = []
    seen: dict[str, int] = {}
    pixel_max = 0
    with open(temporary, "wb") as raw:
        hashing = _HashingFile(raw)
        with tarfile.open(fileobj=hashing, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
            for row, sample in enumerate(task.samples, task.first_row):
                try:
                    if sample.missing:
                        raise UnusableImage("the file is missing")
                    data = read_image(task.root, sample.image, sample.span)
                    image = prepare(data, task.extension, task.encoding)
                except UnusableImage as reason:
                    quarantine.append([sample.key, str(reason)])
                except ValueError as error:
                    raise ValueError(f"{task.root / sample.image}: {error}") from None
                else:
                    tar.addfile(member(f"{sample.key}.{task.extension}", len(image.data)), io.BytesIO(image.data))
                    padded = -(-len(image.data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    rows.append([row, tar.offset - padded, len(image.data)])
                    extension, label = label_member(sample, task.label_kind)
                    tar.addfile(member(f"{sample.key}.{extension}", len(label)), io.BytesIO(label))
                    kind = f"{image.channels}x{image.bit_depth}"
                    seen[kind] = seen.get(kind, 0) + 1
                    pixel_max = max(pixel_max, image.pixel_max)
                if progress:
                    progress(1)
        raw.flush()
        os.fsync(raw.fileno())
    if rows:
        os.replace(temporary, task.folder / task.file)
    else:
        temporary.unlink()
    sync_folder(task.folder)
    content = {
        "file": task.file,
        "samples": len(rows),
        "bytes": hashing.size if rows else 0,
        "sha256": hashing.digest.hexdigest() if rows else "",
        "rows": rows,
        "quarantine": quarantine,
        "seen": seen,
        "pixel_max": pixel_max,
        "range": task.encoding.pixel_max,
    }
    write_atomically(task.marker, json_bytes(content))
    return content


def finished(task: ShardTask) -> dict[str, Any] | None:
    """The marker of a shard that an earlier run finished and that is intact (size, sha256); else None.

    None, too, for a shard whose 16-bit images were scaled from another range: files were changed since.
    """
    try:
        content: dict[str, Any] = json.loads(task.marker.read_bytes())
        if content["range"] != task.encoding.pixel_max:
            return None
        if content["samples"]:
            with open(task.folder / task.file, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                intact = size == content["bytes"]
                intact = intact and hashlib.file_digest(file, "sha256").hexdigest() == content["sha256"]
            return content if intact else None
        return content
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # not finished, or damaged: written again


def write_all(
    tasks: Sequence[ShardTask], workers: int, progress: Callable[[int], object]
) -> Generator[dict[str, Any], None, None]:
    """Write shards with `workers` processes (1: in this one) and yield their markers as they come.

    Raises what `write_shard` raises, and ChildProcessError if a worker was killed.
    """
    return run_all(write_shard, tasks, workers, progress)


class Counted(Protocol):
    """Work of a worker process that is counted in samples."""

    @property
    def samples(self) -> Sized: ...


def run_all(
    work: Callable[..., dict[str, Any]], tasks: Sequence[Counted], workers: int, progress: Callable[[int], object]
) -> Generator[dict[str, Any], None, None]:
    """`work(task, progress)` of every task, by `workers` processes as in `write_all`; the results as they come.

    work: a function of a module, which pickle can name; `progress` is left out in another process.
    """
    if workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            yield work(task, progress)
        return
    # spawn: the parent may hold threads (tqdm, libraries), and a forked copy of a locked lock never opens
    context = multiprocessing.get_context("spawn")
    remaining = iter(tasks)
    with ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=die_with_parent) as pool:
        running: dict[Future[dict[str, Any]], Counted] = {}
        try:
            while True:
                # two shards a worker in flight: a plan of a million images isn't pickled all at once
                while len(running) < 2 * workers and (following := next(remaining, None)) is not None:
                    running[pool.submit(work, following)] = following
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    content = future.result()
                    progress(len(task.samples))
                    yield content
        except BrokenProcessPool:
            raise ChildProcessError(
                "a worker process was killed (out of memory?); run the same command again, with fewer "
                "--workers, to continue after the last finished shard"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def die_with_parent() -> None:
    """Let a worker end when its parent is killed: it would wait for work for ever, or still write shards."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _HashingFile:
    """A file that is only written to and that hashes what passes."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        self._raw.write(data)
        return len(data)

    def tell(self) -> int:
        return self.size

"""Write planned shards, in this process or in several; each is there in full, with its marker, or not."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from scaletransfer.files import json_bytes, sync_folder, write_atomically
from scaletransfer.image_files import read_images
from scaletransfer.sample_table import TOKEN_SEPARATOR
from scaletransfer.shard_image import Encoding, UnusableImage, prepare
from scaletransfer.shard_plan import Plan, Sample
from scaletransfer.shard_pool import run_all

WORK_FOLDER = ".make_shards"
"""In the output folder while it is being made: the plan's hash, a lock, a marker a finished shard, segments of those
that several processes write."""
SEGMENTS = 8
"""Into which the last shards are divided where several processes write: the last one to end is late by an eighth."""
MIN_SEGMENT = 4
COPIED_AT_ONCE = 1 << 22
"""Bytes."""


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


def member_bytes(name: str, data: bytes) -> bytes:
    """A tar member as it lies in the file: header, content, zeros up to a whole block."""
    header = member(name, len(data)).tobuf(tarfile.USTAR_FORMAT)
    return b"".join((header, data, bytes(-len(data) % tarfile.BLOCKSIZE)))


def member(name: str, size: int) -> tarfile.TarInfo:
    """Header of a tar member; nothing of machine or day goes in, so that equal samples give equal bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o444, 0
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


def write_shard(task: ShardTask, progress: Callable[[int], object] | None = None) -> dict[str, Any]:
    """Write one shard: temporary file, fsync, rename, then its marker, whose content is returned.

    The marker: {file, samples, bytes, sha256, rows [[row of the plan, offset, size, CRC-32]], quarantine [[key,
    reason]], seen {"<channels>x<bits>": images}, pixel_max, range}.  If no image is usable, no tar is written and
    bytes is 0. `progress` is called with 1 after every sample.  Raises ValueError for an image that the
    options can't store, OSError for a file that can't be read or written; what it had written then is gone.
    """
    with _new_shard(task) as out:
        return _finish(task, out, [_write_samples(task, out, progress)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Consecutive samples of a shard that several processes write; picklable."""

    task: ShardTask
    """With these samples alone."""
    number: int
    of: int

    @property
    def samples(self) -> Sequence[Sample]:
        return self.task.samples

    @property
    def path(self) -> Path:
        """What it is written to, until the shard is put together."""
        return self.task.folder / WORK_FOLDER / f"{self.task.file}.{self.number:04d}.part"


def divided(tasks: Sequence[ShardTask], workers: int) -> list[ShardTask | Segment]:
    """The work of `workers` processes: shards, and the last of them in segments, so that all end together.

    One shard a worker is divided: while the last whole one is written, the others have as much to do.  A segment has
    at least MIN_SEGMENT samples.
    """
    whole = max(0, len(tasks) - workers) if workers > 1 else len(tasks)
    work: list[ShardTask | Segment] = list(tasks[:whole])
    for task in tasks[whole:]:
        wanted = max(SEGMENTS, -(-SEGMENTS * workers // len(tasks)))
        parts = max(1, min(wanted, len(task.samples) // MIN_SEGMENT))
        if parts == 1:
            work.append(task)
            continue
        bounds = [len(task.samples) * part // parts for part in range(parts + 1)]
        for number, (start, end) in enumerate(itertools.pairwise(bounds)):
            part = replace(task, samples=task.samples[start:end], first_row=task.first_row + start)
            work.append(Segment(task=part, number=number, of=parts))
    return work


def write_part(work: ShardTask | Segment, progress: Callable[[int], object] | None = None) -> dict[str, Any]:
    """Write a whole shard as `write_shard` does, or a segment: {part, of} and what `_write_samples` says.

    A segment is neither hashed nor made durable: after a crash it is written again.
    """
    if isinstance(work, ShardTask):
        return write_shard(work, progress)
    with _removed_on_error(work.path), open(work.path, "wb") as raw:
        content = _write_samples(work.task, _HashingFile(raw, hashed=False), progress)
    return {"part": work.number, "of": work.of, **content}


def join(task: ShardTask, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put the written segments of a shard together, in order: its marker, as `write_shard` gives it."""
    with _new_shard(task) as out:
        for part in parts:
            path = Segment(task=task, number=part["part"], of=part["of"]).path
            start = out.size
            with open(path, "rb") as segment:
                while block := segment.read(COPIED_AT_ONCE):
                    out.write(block)
            path.unlink()
            part["rows"] = [[row, start + offset, *rest] for row, offset, *rest in part["rows"]]
        return _finish(task, out, parts)


def _write_samples(
    task: ShardTask, out: _HashingFile, progress: Callable[[int], object] | None = None
) -> dict[str, Any]:
    """Append the members of the task's samples: {file, rows, quarantine, seen, pixel_max}, with offsets in `out`."""
    rows: list[list[int]] = []
    quarantine: list[list[str]] = []
    seen: Counter[str] = Counter()
    pixel_max = 0
    wanted = [(sample.image, sample.span) for sample in task.samples if not sample.missing]
    with closing(read_images(task.root, wanted)) as images:
        for row, sample in enumerate(task.samples, task.first_row):
            try:
                if sample.missing:
                    raise UnusableImage("the file is missing")
                data = next(images)()
                image = prepare(data, task.extension, task.encoding)
            except UnusableImage as reason:
                quarantine.append([sample.key, str(reason)])
            except ValueError as error:
                raise ValueError(f"{task.root / sample.image}: {error}") from None
            else:
                extension, label = label_member(sample, task.label_kind)
                rows.append([row, out.size + tarfile.BLOCKSIZE, len(image.data), zlib.crc32(image.data)])
                out.write(member_bytes(f"{sample.key}.{task.extension}", image.data))
                out.write(member_bytes(f"{sample.key}.{extension}", label))
                seen[f"{image.channels}x{image.bit_depth}"] += 1
                pixel_max = max(pixel_max, image.pixel_max)
            if progress:
                progress(1)
    return {"file": task.file, "rows": rows, "quarantine": quarantine, "seen": dict(seen), "pixel_max": pixel_max}


def _finish(task: ShardTask, out: _HashingFile, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """End the tar, make it durable and visible, then write its marker, whose content is returned."""
    rows = [row for part in parts for row in part["rows"]]
    if rows:
        # two empty blocks, then zeros up to a whole record, as tar writes it
        out.write(bytes(-(out.size + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE + 2 * tarfile.BLOCKSIZE))
        out.publish(task.folder / task.file)
    else:
        out.remove()
    sync_folder(task.folder)
    content = {
        "file": task.file,
        "samples": len(rows),
        "bytes": out.size if rows else 0,
        "sha256": out.digest.hexdigest() if rows else "",
        "rows": rows,
        "quarantine": [entry for part in parts for entry in part["quarantine"]],
        "seen": dict(sum((Counter(part["seen"]) for part in parts), Counter())),
        "pixel_max": max(part["pixel_max"] for part in parts),
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
    named = {task.file: task for task in tasks}
    _remove_segments(named.values())  # of a run that was killed
    written: dict[str, list[dict[str, Any]]] = {}
    try:
        with closing(run_all(write_part, divided(tasks, workers), workers, progress)) as results:
            for content in results:
                if "part" not in content:
                    yield content
                    continue
                parts = written.setdefault(content["file"], [])
                parts.append(content)
                if len(parts) == content["of"]:
                    yield join(named[content["file"]], sorted(parts, key=itemgetter("part")))
    finally:
        _remove_segments(named.values())


def _remove_segments(tasks: Iterable[ShardTask]) -> None:
    files: dict[Path, set[str]] = {}
    for task in tasks:
        files.setdefault(task.folder / WORK_FOLDER, set()).add(task.file)
    for work, names in files.items():
        # of these shards alone: another process may write others of the folder
        for path in work.glob("*.tar.*.part"):
            if path.name.rsplit(".", 2)[0] in names:
                path.unlink(missing_ok=True)


@contextmanager
def _new_shard(task: ShardTask) -> Iterator[_HashingFile]:
    """The temporary file of a shard, which is gone after an error."""
    temporary = task.folder / f"{task.file}.tmp"
    with _removed_on_error(temporary), open(temporary, "wb") as raw:
        yield _HashingFile(raw)


@contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


class _HashingFile:
    """A file that is only written to, and hashed on the way."""

    def __init__(self, raw: BinaryIO, *, hashed: bool = True) -> None:
        self._raw = raw
        self._hashed = hashed
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        if self._hashed:
            self.digest.update(data)
        self.size += len(data)
        self._raw.write(data)

    def publish(self, path: Path) -> None:
        """Make it durable, then visible under its name."""
        self._raw.flush()
        os.fsync(self._raw.fileno())
        os.replace(self._raw.name, path)

    def remove(self) -> None:
        os.unlink(self._raw.name)

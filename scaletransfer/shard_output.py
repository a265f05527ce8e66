"""The folder that a build writes: whose it is, who writes it now, which shards in it are finished.

While a build goes on, its work folder `.make_shards` holds `plan.json` (the hash of the plan; of a build in parts
`part-<I>-of-<N>.json`, one a part), locks, and a marker for each finished shard.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaletransfer.files import drop_if_empty, json_bytes, lack_of_space_named, write_atomically
from scaletransfer.index import INDEX_NAME, ShardIndex, load_index
from scaletransfer.shard_writer import WORK_FOLDER, ShardTask, finished

INFO_NAME = "_info.json"
_OURS = re.compile(
    r"((train|valid|test)-\d{6}\.tar|samples-\w+\.npy|wids-\w+\.json)((\.\d+)?\.tmp)?|(index|_info)\.json(\.\d+)?\.tmp"
)
"""With a number where a process copies to a `file://` URL."""
_HEAD = (INDEX_NAME, INFO_NAME)
_PLAN = f"{WORK_FOLDER}/plan.json"
_PART = re.compile(rf"{re.escape(WORK_FOLDER)}/part-(\d+)-of-(\d+)\.json")


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """One of `of` parts of a build; numbers begin with 0, as those of the tasks of a SLURM array."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def name(self) -> str:
        """Of its files in the work folder."""
        return f"part-{self.number}-of-{self.of}"


def parse_part(text: str) -> Part:
    """`Part` of "I/N", I from 0 to N - 1; ValueError for anything else."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(
            f"--part is {text!r}; give I/N, with I from 0 to N - 1: 0/4, 1/4, 2/4, 3/4 for four parts "
            "($SLURM_ARRAY_TASK_ID/4 in a job with --array=0-3)"
        )
    return Part(int(match[1]), int(match[2]))


class Output:
    """A local folder for shards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """Where shards are written."""

    def __str__(self) -> str:
        """For sentences: what was given as --out."""
        return str(self.folder)

    def prepare(self) -> None:
        """Make the folder; ValueError if a file is there."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--out {self.folder} is a file; give a folder")
        (self.folder / WORK_FOLDER).mkdir(parents=True, exist_ok=True)

    # files by name: "index.json", or ".make_shards/plan.json" for what is in the work folder

    def names(self) -> list[str]:
        """Names of the files in the folder and in its work folder, sorted."""
        found = []
        for prefix in ("", f"{WORK_FOLDER}/"):
            try:
                with os.scandir(self.folder / prefix) as entries:
                    found += [prefix + entry.name for entry in entries if entry.is_file()]
            except (FileNotFoundError, NotADirectoryError):
                pass
        return sorted(found)

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None where there is none."""
        try:
            return (self.folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write a small file, whole or not at all."""
        write_atomically(self.folder / name, data)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files in this order, the work folder once it is empty; they may be gone already."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
        drop_if_empty(self.folder / WORK_FOLDER)

    # shards

    def done(
        self, tasks: Sequence[ShardTask], threads: int, progress: Callable[[int], object]
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """({file: marker} of shards that are finished and intact, files of those that have a marker and are not).

        Every byte is hashed. `progress` is called with the samples of each finished shard.
        """
        contents, damaged = {}, []
        with ThreadPoolExecutor(max(1, threads)) as pool:  # hashing runs beside other threads
            for task, content in zip(tasks, pool.map(finished, tasks), strict=True):
                if content is not None:
                    contents[task.file] = content
                    progress(len(task.samples))
                elif task.marker.exists():
                    damaged.append(task.file)
        return contents, damaged

    @contextmanager
    def storing(self) -> Iterator[Callable[[ShardTask, dict[str, Any]], None]]:
        """A function that takes every shard that was written, with its marker; at the end all of them are stored."""
        yield lambda task, content: None

    def index(self) -> ShardIndex:
        """The index of finished shards; ValueError as `index.load_index`."""
        return load_index(self.folder)

    def publish(self, names: Sequence[str]) -> None:
        """Store files that were written into `folder`, in this order."""

    def known_range(self) -> int | None:
        """The measured range of 16-bit images, where an interrupted build has kept it."""
        return None  # that of each shard is in the work folder (`shard_range`)

    def keep_range(self, white: int) -> None:
        """Keep it for a build that goes on elsewhere."""

    def clean(self, part: Part | None = None) -> None:
        """Remove what the build, or one part of it, has left elsewhere than in the output."""


def plan_of_index(out: Output) -> str:
    """The hash of the plan that the finished shards in `out` were made with; "" if there are none."""
    try:
        content = json.loads(out.read(INDEX_NAME) or b"null")
    except ValueError:
        content = None
    return str(content.get("plan_sha256", "")) if isinstance(content, dict) else ""


def parts_in(out: Output, names: Iterable[str]) -> dict[Part, str]:
    """{part: hash of its plan} of the parts that were begun; `names`: those of `out`."""
    found = {}
    for name in names:
        if match := _PART.fullmatch(name):
            found[Part(int(match[1]), int(match[2]))] = _plan_in(out.read(name))
    return found


@contextmanager
def claimed(out: Output, digest: str, *, part: Part | None = None, overwrite: bool = False) -> Iterator[None]:
    """Hold `out` for a build of the plan `digest`, or for one part of it.

    Raises ValueError, in a sentence that names what is there, if it holds anything else, or if another process writes
    it (or the same part).  Locks hold on one machine and on network file systems that have locks.
    """
    before = out.names()
    leftovers = ours(before)
    if not overwrite and leftovers and not any(name.startswith(f"{WORK_FOLDER}/") for name in before):
        what = "finished shards" if INDEX_NAME in leftovers else f"files such as {leftovers[0]}"
        raise ValueError(
            f"{out} holds {what} made from other data or with other options; give another --out, "
            + ("or remove them first" if part else "or --overwrite to replace them")
        )
    with ExitStack() as locks:
        locks.enter_context(lack_of_space_named(out.folder))
        out.prepare()
        if part is None:
            _lock(locks, out.folder / WORK_FOLDER / "lock", f"another make_shards is writing {out}")
        else:
            _lock(locks, out.folder / WORK_FOLDER / "lock", f"another make_shards is writing {out}", shared=True)
            where = out.folder / WORK_FOLDER / f"{part.name}.lock"
            _lock(locks, where, f"another make_shards is writing part {part} of {out}")
        if overwrite:
            clear(out)
            out.prepare()
        names = out.names()
        record = f"{WORK_FOLDER}/{part.name}.json" if part else _PLAN
        begun = record in names
        _same_plan(out, names, digest, part)
        if not begun:
            out.write(record, json_bytes({"plan_sha256": digest}))
            if part:
                try:  # again, for another part may have begun at the same moment
                    _same_plan(out, out.names(), digest, part)
                except ValueError:
                    out.remove([record])
                    raise
        yield


def _same_plan(out: Output, names: Sequence[str], digest: str, part: Part | None) -> None:
    mend = "remove the folder" if part else "--overwrite to start again"
    planned = _plan_in(out.read(_PLAN)) if _PLAN in names else digest
    if planned != digest or INDEX_NAME in names:
        raise ValueError(
            f"{out} holds a build of other data or with other options that was interrupted; give the "
            f"same options to continue it, another --out, or {mend}"
        )
    parts = parts_in(out, names)
    for other, its in sorted(parts.items()):
        if its != digest and other != part:
            raise ValueError(
                f"{out} holds part {other} of other data or with other options; give every part the same options, "
                f"another --out, or {mend}"
            )
        if part and other.of != part.of:
            raise ValueError(
                f"{out} holds part {other}, which overlaps with part {part}; give every part the same N, "
                "another --out, or remove the folder"
            )
    if part and parts.get(part, digest) != digest:
        raise ValueError(
            f"{out} holds part {part} of other data or with other options; give the same options to continue it, "
            "another --out, or remove the folder"
        )


def _plan_in(data: bytes | None) -> str:
    try:
        return str(json.loads(data or b"{}").get("plan_sha256", ""))
    except (ValueError, AttributeError):
        return ""  # damaged: nobody's plan


def _lock(stack: ExitStack, path: Path, held: str, *, shared: bool = False) -> None:
    try:
        # to read and write: a network file system asks for the one or the other
        file = stack.enter_context(path.open("a+b"))
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{held}; wait for it to end") from None
        except OSError:
            pass  # some network file systems have no locks; two builds of one plan would still write equal bytes
        if os.fstat(file.fileno()).st_ino != os.stat(path).st_ino:
            raise FileNotFoundError(path)
    except FileNotFoundError:
        # whoever held it removed it in this moment: that build is finished
        raise ValueError(f"{held}; wait for it to end") from None


def ours(names: Iterable[str]) -> list[str]:
    """Those of the names that make_shards writes, the index first; without its work folder."""
    given = set(names)
    return [name for name in _HEAD if name in given] + sorted(name for name in given if _OURS.fullmatch(name))


def clear(out: Output) -> None:
    """Remove what make_shards writes, the index first, so that no reader takes a folder in between; locks stay."""
    names = out.names()
    out.remove([*ours(names), *_work(names, locks=False)])


def clear_part(out: Output, part: Part, tasks: Sequence[ShardTask]) -> None:
    """Remove what one part has written, its record at the end."""
    names = [name for task in tasks for name in (f"{WORK_FOLDER}/{task.file}.json", task.file, f"{task.file}.tmp")]
    out.remove([*names, f"{WORK_FOLDER}/{part.name}.json"])


def remove_work(out: Output) -> None:
    """Remove the work folder and what killed processes left; the build is finished, or cleared."""
    names = out.names()
    out.remove([*(name for name in ours(names) if name.endswith(".tmp")), *_work(names, locks=True)])
    out.clean()


def _work(names: Iterable[str], *, locks: bool) -> list[str]:
    work = [name for name in names if name.startswith(f"{WORK_FOLDER}/")]
    return [name for name in work if locks or not name.endswith(("/lock", ".lock"))]

"""How a checkpoint gets onto the disk: complete, or not there. No tensors, no collectives: a thread of each rank may.

Each rank writes its file, and last ``rank-XXXXX.json`` beside it. Rank 0 waits until all of them are there, joins them
in the manifest, writes the marker, gives the folder its name, moves ``latest`` and deletes what is older. The folder's
hidden name has a part that was drawn for this save alone, so that a rank that outlived a killed run cannot write into
a later run's.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from scaletransfer.engine.checkpoint import (
    FORMAT,
    FORMAT_VERSION,
    LATEST,
    MANIFEST,
    MARKER,
    complete,
    folder_name,
    pieces_by_tensor,
    rank_file,
)
from scaletransfer.files import sync_folder
from scaletransfer.tensor_file import Layout, write_tensors

LOCK = ".saving"
_POLL = 0.05  # seconds between two looks for the other ranks' files
_LONGEST_POLL = 1.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """One save, as one rank sees it.

    Args:
        root, step: where it goes; token: drawn by rank 0 for this save. keep: complete checkpoints that stay.
        names: (tensor, start, stop) of what this rank writes. data: its float32 values, a part at a time.
        generators: states of the random generators.
        head: what the manifest says beside ``tensors`` and ``ranks``. shapes: of all tensors there can be.
        timeout: seconds that rank 0 waits for the others once its own file is there.
        finished: called by rank 0 with the folder once ``latest`` names it, before older ones are deleted; it returns
            those of them that must stay.
    """

    root: Path
    step: int
    token: str
    rank: int
    world: int
    keep: int
    names: Sequence[tuple[str, int, int]]
    data: Callable[[], Iterable[Iterable[np.ndarray]]]
    generators: dict[str, bytes]
    head: dict[str, Any]
    shapes: dict[str, list[int]]
    timeout: float
    finished: Callable[[Path], set[Path]] = field(default=lambda folder: set())

    @property
    def final(self) -> Path:
        return self.root / folder_name(self.step)

    @property
    def temporary(self) -> Path:
        return hidden(self.root, self.step, self.token)

    def run(self) -> None:
        """Write this rank's file; rank 0: then the checkpoint.

        Raises:
            OSError: disk full or not writable, on this rank or (rank 0) on another, which is named; a rank that did
                not write in time. ValueError: what the ranks wrote does not tile the tensors. The earlier checkpoints
                and ``latest`` stay as they are.
        """
        if self.rank:
            self._leaving_note(self._write_rank)
            return
        try:
            self._write_rank()
        except OSError:
            (self.temporary / rank_file(0)).unlink(missing_ok=True)  # room for the sentence with which the run ends
            raise
        self._finish(self._collect())

    @property
    def told(self) -> bool:
        """Whether this rank has left word for rank 0 that it failed."""
        return (self.temporary / rank_file(self.rank)).with_suffix(".failed").exists()

    def _leaving_note(self, write: Callable[[], None]) -> None:
        """What fails here is told to rank 0, which would wait for the time limit."""
        try:
            write()
        except BaseException as error:
            path = self.temporary / rank_file(self.rank)
            path.unlink(missing_ok=True)  # room for the note
            _write(path.with_suffix(".failed"), " ".join(str(error).split()) or type(error).__name__)
            raise

    def _write_rank(self) -> None:
        listing: list[dict[str, Any]] = []
        layout: Layout = {name: ("F32", [stop - start]) for name, start, stop in self.names}
        layout = {**layout, **{f"rng.{kind}": ("U8", [len(state)]) for kind, state in self.generators.items()}}

        def data() -> Iterator[np.ndarray]:
            for (name, start, stop), chunks in zip(self.names, self.data(), strict=True):
                digest = hashlib.sha256()
                for chunk in chunks:
                    digest.update(chunk.data)
                    yield chunk
                listing.append({"tensor": name, "start": start, "stop": stop, "sha256": digest.hexdigest()})
            for state in self.generators.values():
                yield np.frombuffer(state, dtype=np.uint8)

        path = self.temporary / rank_file(self.rank)
        try:
            digest = write_tensors(path, layout, data())
        except OSError as error:
            raise OSError(
                f"{path} cannot be written ({error.strerror or error}): the checkpoints before it stay as they are"
            ) from error
        generators = {kind: hashlib.sha256(state).hexdigest() for kind, state in self.generators.items()}
        content = {"file_sha256": digest, "pieces": listing, "rng": generators}
        _write_whole(path.with_suffix(".json"), json.dumps(content))

    def _collect(self) -> list[dict[str, Any]]:
        """Every rank's listing, once all are there."""
        found: dict[int, dict[str, Any]] = {}
        pause, end = _POLL, time.monotonic() + self.timeout
        while True:
            there = set(os.listdir(self.temporary))
            late = time.monotonic() > end
            for rank in (rank for rank in range(self.world) if rank not in found):
                path = self.temporary / rank_file(rank)
                if path.with_suffix(".failed").name in there:
                    said = path.with_suffix(".failed").read_text(encoding="utf-8")
                    raise OSError(f"rank {rank} could not write its part of the checkpoint of step {self.step}: {said}")
                if path.with_suffix(".json").name in there:
                    content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
                    found[rank] = {"file": rank_file(rank), **content}
            if len(found) == self.world:
                return [found[rank] for rank in range(self.world)]
            if late:
                missing = [rank for rank in range(self.world) if rank not in found]
                names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
                raise OSError(
                    f"the checkpoint of step {self.step} is not complete after {self.timeout / 60:g} minutes: rank "
                    f"{names} of {self.world} wrote nothing to {self.root}; see that all ranks share this folder and "
                    "are alive, or raise checkpoint.timeout_minutes"
                )
            time.sleep(pause)
            pause = min(_LONGEST_POLL, 1.5 * pause)

    def _finish(self, ranks: list[dict[str, Any]]) -> None:
        written = {entry["tensor"] for rank in ranks for entry in rank["pieces"]}
        # A parameter that never had a gradient has no momentum.
        tensors = {n: s for n, s in self.shapes.items() if n.startswith("model.") or n in written}
        manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "step": self.step}
        manifest |= {**self.head, "tensors": tensors, "ranks": ranks}
        pieces_by_tensor(manifest, self.final)  # the ranges of all ranks tile every tensor, or it is not complete
        publish(self.temporary, self.final, json.dumps(manifest, indent=1))
        prune(self.root, self.keep, self.final, self.finished(self.final))


def hold(root: Path) -> IO[str]:
    """Make ``root``, and hold it for a save until what is returned is closed. Rank 0 calls this.

    As with the run folder, the lock is POSIX's: it ends with the process, and loader processes do not inherit it.

    Raises:
        OSError: another process saves in ``root``.
    """
    root.mkdir(parents=True, exist_ok=True)
    handle = (root / LOCK).open("a", encoding="utf-8")
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            handle.close()
            raise OSError(
                f"another process saves in {root}: wait for it, end it, or give this run another name"
            ) from error
        # Some network file systems have no locks: then nothing keeps two runs apart but the person who starts them.
    return handle


def hidden(root: Path, step: int, token: str) -> Path:
    """The folder in which checkpoint ``step`` is until it is complete."""
    return root / f".{folder_name(step)}.{token}.tmp"


def clear(root: Path) -> None:
    """Delete what killed saves left. Whoever calls this holds ``root``, so that nothing of it is being written."""
    for stale in root.glob(".step-*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)


def publish(temporary: Path, final: Path, manifest: str) -> None:
    """Complete a folder in which every rank's file is, give it its name, and let ``latest`` name it."""
    _write(temporary / MANIFEST, manifest)
    _write(temporary / MARKER, hashlib.sha256(manifest.encode()).hexdigest() + "\n")
    sync_folder(temporary)
    if final.exists():
        _drop(final)
    os.replace(temporary, final)
    sync_folder(final.parent)
    _write_whole(final.parent / LATEST, final.name + "\n")
    sync_folder(final.parent)


def prune(root: Path, keep: int, newest: Path, needed: set[Path] | frozenset[Path] = frozenset()) -> None:
    """Keep ``newest``, the ``keep`` - 1 before it, and what is ``needed``.

    In ``best`` a later step may stand, left by an earlier run.
    """
    others = [path for path in complete(root) if path != newest]
    for old in others[: max(0, len(others) - (keep - 1))]:
        if old not in needed:
            _drop(old)


def _drop(folder: Path) -> None:
    """Delete a checkpoint: at no moment is there a part of it under its name."""
    aside = folder.with_name(f".{folder.name}.old.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    shutil.rmtree(aside)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def _write_whole(path: Path, text: str) -> None:
    """Nobody sees half of it."""
    aside = path.with_name(f".{path.name}.tmp")
    _write(aside, text)
    os.replace(aside, path)

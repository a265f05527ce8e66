"""Where a run goes on from: its own newest checkpoint, or a newer one in another folder or behind a URL."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from scaletransfer import storage
from scaletransfer.engine import checkpoint_save
from scaletransfer.engine.checkpoint import (
    MANIFEST,
    MARKER,
    Checkpoint,
    find_latest,
    folder_name,
    open_checkpoint,
    parse,
)
from scaletransfer.storage_errors import StorageError, shown
from scaletransfer.storage_settings import RemoteSettings

LATEST = "latest"
_THREADS = 4
_BEAT = 5.0  # seconds between two words of rank 0 while it fetches


def place(resume: str, upload: str | None, name: str) -> str | None:
    """The URL in which to look for a newer checkpoint of the run ``name``, or None.

    Args:
        resume, upload: the configuration's ``checkpoint.resume`` and ``checkpoint.upload``.
    """
    if resume == LATEST:
        return None if upload is None else storage.join(as_url(upload), name)
    return as_url(resume)


def as_url(text: str) -> str:
    """A URL as it is, a folder as one."""
    return text if storage.is_url(text) else f"file://{os.path.abspath(os.path.expanduser(text))}"


def newest(url: str, remote: RemoteSettings = storage.DEFAULT) -> tuple[int, str] | None:
    """(step, URL) of the newest complete checkpoint in ``url``: itself, ``step-*`` or ``checkpoints/step-*`` in it.

    Raises:
        ValueError: the storage does not answer.
    """
    found: list[tuple[int, str]] = []
    url = url.rstrip("/")
    for path in storage.list_files(url, remote):
        inside = re.fullmatch(rf"(?P<folder>(?:checkpoints/)?step-(?P<step>\d{{8}}))/{MARKER}", path)
        if inside:
            found.append((int(inside["step"]), storage.join(url, inside["folder"])))
        elif path == MARKER and (own := re.fullmatch(r".*/step-(\d{8})", url)):
            found.append((int(own[1]), url))
    return max(found, default=None)


def fetch(
    url: str, root: Path, accept: Callable[[Checkpoint], None], remote: RemoteSettings = storage.DEFAULT
) -> Checkpoint:
    """Copy the checkpoint ``url`` into ``root``: complete and with the hashes of its manifest, or not at all.

    Args:
        accept: raises where it does not fit the run; called before anything is copied.

    Raises:
        ValueError: it is damaged, or the storage or the disk fails. OSError: another process saves in ``root``.
    """
    found, manifest = _described(url, root, remote)
    accept(found)
    with checkpoint_save.hold(root):
        checkpoint_save.clear(root)
        temporary = checkpoint_save.hidden(root, found.step, secrets.token_hex(8))
        temporary.mkdir()
        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                ranks = found.manifest["ranks"]
                list(pool.map(lambda rank: _file(url, temporary, rank["file"], rank["file_sha256"], remote), ranks))
            checkpoint_save.publish(temporary, found.folder, manifest.decode("utf-8"))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return open_checkpoint(found.folder)


def _described(url: str, root: Path, remote: RemoteSettings) -> tuple[Checkpoint, bytes]:
    """What the manifest at ``url`` says, as a checkpoint that is to be in ``root``; and the manifest's bytes."""
    manifest, marker = (storage.read_bytes(storage.join(url, name), remote) for name in (MANIFEST, MARKER))
    step = int(url.rstrip("/")[-8:])
    found = parse(root / folder_name(step), manifest, marker, where=shown(url))
    if found.step != step:
        raise ValueError(f"{shown(url)} holds step {found.step}: give the folder the name that it had")
    return found, manifest


def _file(url: str, folder: Path, name: str, expected: str, remote: RemoteSettings) -> None:
    digest = hashlib.sha256()
    storage.download(storage.join(url, name), folder / name, remote, seen=digest.update)
    if digest.hexdigest() != expected:
        raise ValueError(
            f"{shown(storage.join(url, name))} differs from what was saved (sha256): delete this checkpoint there and "
            "start again"
        )
    with (folder / name).open("rb") as file:
        os.fsync(file.fileno())


@dataclass
class Start:
    """Where a run goes on from. ``found`` is its own newest checkpoint, and after ``look`` the newest there is.

    Args:
        root: of the run's checkpoints. place: URL in which a newer one may be, or None. demanded: a person named it.
        accept: raises where a checkpoint does not fit the run.
    """

    root: Path
    place: str | None
    demanded: bool
    accept: Callable[[Checkpoint], None]
    remote: RemoteSettings = storage.DEFAULT
    found: Checkpoint | None = None

    def __post_init__(self) -> None:
        latest = find_latest(self.root)
        if latest is not None:
            self.found = open_checkpoint(latest)
            self.accept(self.found)

    def look(self, rank: int, device: torch.device) -> None:
        """Fetch a newer one if there is one. All ranks call this, once the process group is there.

        Raises:
            ValueError: what was asked for is not there, does not fit the run, is damaged or cannot be reached.
        """
        if self.place is None:
            return
        step = _together(self._fetched, rank, device)
        if step >= 0 and (self.found is None or self.found.step != step):
            self.found = open_checkpoint(self.root / folder_name(step))

    def peek(self) -> tuple[int, str]:
        """(step, where) of the checkpoint from which the run would go on, (0, "") for none; nothing is fetched.

        Raises:
            ValueError: as ``look``, but for damage that its manifest does not show.
        """
        newer = None if self.place is None else self._newer()
        if newer is not None:
            self.accept(_described(newer[1], self.root, self.remote)[0])
            return newer[0], shown(newer[1])
        return (0, "") if self.found is None else (self.found.step, str(self.found.folder))

    def _fetched(self) -> int:
        """The step from which to go on, once it is in ``root``; -1 for none. Rank 0 calls this."""
        newer = self._newer()
        if newer is None:
            return -1 if self.found is None else self.found.step
        print(f"fetching {shown(newer[1])}", flush=True)
        fetch(newer[1], self.root, self.accept, self.remote)
        return newer[0]

    def _newer(self) -> tuple[int, str] | None:
        """(step, URL) of a checkpoint in ``place`` that is newer than the run's own, if there is one."""
        assert self.place is not None
        own = -1 if self.found is None else self.found.step
        try:
            there = newest(self.place, self.remote)
        except StorageError as error:
            if own < 0 or self.demanded:
                raise
            print(f"note: looking for a newer checkpoint failed, going on from step {own}: {error}", file=sys.stderr)
            return None
        if there is None and own < 0 and self.demanded:
            raise ValueError(f"--resume {shown(self.place)}: there is no complete checkpoint (step-*/{MARKER}) in it")
        if there is None or there[0] <= own:
            if self.demanded and own >= 0:
                print(f"note: the run's own checkpoint of step {own} is not older than those in {shown(self.place)}")
            return None
        return there


def _together(work: Callable[[], int], rank: int, device: torch.device) -> int:
    """What ``work`` returns on rank 0, on all ranks; it may take longer than the group's time limit."""
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    if alone:
        return work()
    result: list[int] = []
    failure: list[Exception] = []

    def run() -> None:
        try:
            result.append(work())
        except Exception as error:
            failure.append(error)

    thread = None
    if rank == 0:
        thread = threading.Thread(target=run, name="checkpoint-fetch", daemon=True)
        thread.start()
    running, failed = -2, -3
    while True:
        state = torch.zeros((), dtype=torch.int64, device=device)
        if thread is not None:
            thread.join(_BEAT)
            state.fill_(running if thread.is_alive() else failed if failure else result[0])
        dist.broadcast(state, 0)
        if int(state) == failed:
            raise failure[0] if failure else ValueError("rank 0 could not fetch the checkpoint: its line says why")
        if int(state) != running:
            return int(state)

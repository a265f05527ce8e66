"""Copies finished checkpoints to a folder behind a URL while training goes on. Rank 0 alone does this.

    <checkpoint.upload>/<name of the run>/step-00000120/   the files of the checkpoint, COMPLETE last

A copy that fails is said, never ends the run, and is tried again with the next checkpoint; what it left is deleted
with the older ones.
"""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scaletransfer import storage
from scaletransfer.engine.checkpoint import MANIFEST, MARKER
from scaletransfer.storage_errors import shown
from scaletransfer.storage_settings import RemoteSettings

_THREADS = 4


class Uploader:
    """A thread that copies the newest checkpoint it was given; one that waits when the next is there is passed over.

    Args:
        url: the folder of the run. keep: complete checkpoints that stay there.
    """

    def __init__(self, url: str, keep: int, remote: RemoteSettings = storage.DEFAULT) -> None:
        self.url = url.rstrip("/")
        self._keep = keep
        self._remote = remote
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._running: Path | None = None
        self._messages: list[str] = []
        self._alive = False

    def submit(self, folder: Path) -> set[Path]:
        """Copy a complete checkpoint, soon. Returns the folders that must stay until they are copied."""
        with self._changed:
            self._waiting = folder
            if not self._alive:
                self._alive = True
                threading.Thread(target=self._work, name="checkpoint-upload", daemon=True).start()
            return {path for path in (self._waiting, self._running) if path is not None}

    def messages(self) -> list[str]:
        """What has happened since the last call, a sentence each."""
        with self._changed:
            found, self._messages = self._messages, []
        return found

    def finish(self, seconds: float) -> bool:
        """Wait until nothing is left to copy, at most so long; whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._alive, seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running, self._waiting = self._waiting, None
                if self._running is None:
                    self._alive = False
                    self._changed.notify_all()
                    return
                folder = self._running
            try:
                copy(folder, storage.join(self.url, folder.name), self._remote)
                prune(self.url, self._keep, folder.name, self._remote)
                message = f"{folder.name} is copied to {shown(self.url)}"
            except Exception as error:
                # Whatever it is: training does not depend on it.
                text = " ".join(str(error).split()) or type(error).__name__
                message = f"{folder} is not copied, training goes on and the next checkpoint is tried: {text}"
            with self._changed:
                self._messages.append(message)
                self._running = None


def copy(folder: Path, url: str, remote: RemoteSettings = storage.DEFAULT) -> None:
    """Copy a complete checkpoint to ``url``, its marker last. One that is there is replaced, unless it is the same.

    Raises:
        ValueError: the storage does not take it, or has other sizes afterwards. OSError: ``folder`` cannot be read.
    """
    marker = (folder / MARKER).read_bytes()
    there = storage.sizes(url, remote)
    if MARKER in there:
        if storage.read_bytes(storage.join(url, MARKER), remote) == marker:
            return
        storage.remove(storage.join(url, MARKER), remote)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    names = [*(rank["file"] for rank in manifest["ranks"]), MANIFEST]
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda name: storage.upload(folder / name, storage.join(url, name), remote), names))
    there = storage.sizes(url, remote)
    for name in names:
        if there.get(name) != (folder / name).stat().st_size:
            raise ValueError(f"{shown(storage.join(url, name))} has {there.get(name)} bytes after it was copied there")
    storage.write_bytes(marker, storage.join(url, MARKER), remote)


def prune(url: str, keep: int, newest: str, remote: RemoteSettings = storage.DEFAULT) -> None:
    """Keep ``newest`` and the ``keep`` - 1 before it of the complete checkpoints in ``url``, and no parts of others."""
    folders: dict[str, list[str]] = {}
    for path in storage.list_files(url, remote):
        name, slash, file = path.partition("/")
        if slash and "/" not in file and re.fullmatch(r"step-\d{8}", name) and name != newest:
            folders.setdefault(name, []).append(file)
    finished = sorted(name for name, files in folders.items() if MARKER in files)
    old = finished[: max(0, len(finished) - (keep - 1))]
    for name in [*old, *(name for name in folders if name < newest and name not in finished)]:
        for file in sorted(folders[name], key=lambda file: file != MARKER):  # the marker first
            storage.remove(storage.join(url, f"{name}/{file}"), remote)

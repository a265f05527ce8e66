"""Starts a launcher, and leaves none of its processes behind, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MARK = "SCALETRANSFER_BENCH_LAUNCH"


@contextmanager
def started(command: Sequence[str], *, env: Mapping[str, str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The running command; when left, SIGKILL to all of its processes that still live. options: of Popen."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(command, env={**env, MARK: mark}, **options)
    try:
        yield process
    finally:
        _kill(f"{MARK}={mark}")
        process.wait()


def _kill(mark: str) -> None:
    """SIGKILL to every process that was started with this mark in its environment; returns when all are gone.

    A launcher puts each rank into a session of its own, so that no signal to a group reaches them.
    """
    for _ in range(600):
        living = list(_marked(mark.encode()))
        if not living:
            return
        for process in living:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)
    raise ValueError(f"processes {living} live on although they were killed")


def _marked(mark: bytes) -> Iterator[int]:
    """The ids of living processes with ``mark`` in their environment."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    yield int(entry.name)

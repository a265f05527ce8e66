"""Starts a launcher, and leaves none of its processes behind, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MARK = "SCALETRANSFER_BENCH_LAUNCH"


def launch(engine: str, ranks: int, script: Sequence[str], *, threads: int, limit: float) -> None:
    """Run a script on so many ranks of an engine, by its launch file, each with so many threads.

    Raises:
        ValueError: it failed, with the end of what it printed; or it took more than `limit` seconds.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "launch" / f"{engine}.yaml"), "--num_processes", str(ranks), *script]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile() as output:
        with started(command, env=environment, stdout=output, stderr=output) as process:
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired as error:
                raise ValueError(f"{engine} on {ranks} ranks took longer than {limit:g} s") from error
        if status:
            output.seek(0)
            text = output.read().decode(errors="replace")
            raise ValueError(f"{engine} on {ranks} ranks failed: {text[-3000:]}")


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

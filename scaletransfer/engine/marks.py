"""Small files in a run folder for whoever watches a run from outside: a batch script, or a person.

    processes   who trains: one line "rank host process" for each rank, as long as the run lives
    requeue     the run was stopped by a signal and saved: the same command goes on (removed when it does)
    failed      the sentence with which the run failed (removed when it starts again)
    nonfinite-step-00000120.json   keys and positions of a batch whose loss or gradient was NaN or infinite

A batch script does not know the run folder. Where SCALETRANSFER_RUN_FILE names a file, the run writes its folder there
as soon as its processes can be signalled.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaletransfer.files import write_atomically

PROCESSES = "processes"
REQUEUE = "requeue"
FAILED = "failed"
RUN_FILE = "SCALETRANSFER_RUN_FILE"


def host() -> str:
    """This host's name: SLURM's where SLURM started this process, else its own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def process() -> int:
    """This process's id."""
    return os.getpid()


def write_start(folder: Path, processes: Sequence[tuple[str, int]]) -> None:
    """Say who trains, and forget how an earlier start ended. Rank 0 calls this.

    processes: host and process id of each rank, by rank.
    """
    for name in (REQUEUE, FAILED):
        (folder / name).unlink(missing_ok=True)
    lines = [f"{rank} {where} {process}\n" for rank, (where, process) in enumerate(processes)]
    write_atomically(folder / PROCESSES, "".join(lines).encode())
    if os.environ.get(RUN_FILE):
        write_atomically(Path(os.environ[RUN_FILE]), f"{folder.resolve()}\n".encode())


def write_end(folder: Path, *, step: int | None = None, why: str = "") -> None:
    """The processes end: nobody shall signal them any more. step: the run was stopped after it, and is to go on."""
    if step is not None:
        text = json.dumps({"step": step, "why": why, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
        write_atomically(folder / REQUEUE, (text + "\n").encode())
    (folder / PROCESSES).unlink(missing_ok=True)


def write_failed(folder: Path, sentence: str) -> None:
    """Keep the sentence with which a run fails. Never raises: it is about to be said anyway."""
    try:
        write_atomically(folder / FAILED, (sentence + "\n").encode())
    except OSError as error:
        print(f"note: {folder / FAILED} cannot be written ({error.strerror})", flush=True)


def nonfinite_name(step: int) -> str:
    """Name of the file that keeps the batch of a step whose loss was not finite."""
    return f"nonfinite-step-{step:08d}.json"


def write_nonfinite(folder: Path, step: int, facts: dict[str, Any]) -> None:
    """Keep what is needed to see a batch again."""
    write_atomically(folder / nonfinite_name(step), (json.dumps({"step": step, **facts}, indent=1) + "\n").encode())

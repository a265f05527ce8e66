"""Starts real multi-process runs as a user would: `accelerate launch --config_file launch/<engine>.yaml ...`."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Result = dict[str, Any]


def environment() -> dict[str, str]:
    """What a launched process gets: one thread, this checkout's code, the test workers, nothing of an outer launch."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "DS_"))
        and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    path = [str(ROOT), str(ROOT / "tests"), *filter(None, [inherited.get("PYTHONPATH")])]
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}


def command(engine: str, processes: int, *arguments: str) -> list[str]:
    """`accelerate launch` of a module with this interpreter."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    return [
        *launcher,
        *("--config_file", str(ROOT / "launch" / f"{engine}.yaml"), "--num_processes", str(processes)),
        *("-m", *arguments),
    ]


def launch(engine: str, processes: int, worker: str, spec: dict[str, Any], *, limit: float = 400) -> list[Result]:
    """Run ``workers/<worker>.py`` under an engine; what each rank returned, by rank.

    ``spec`` goes to the worker as a JSON file, its ``folder`` is added: a directory of this launch alone.

    Raises:
        AssertionError: a process failed, or the time limit (seconds) passed; the message has the output's end.
    """
    with tempfile.TemporaryDirectory(prefix="scaletransfer-launch-") as name:
        folder = Path(name)
        case = folder / "spec.json"
        case.write_text(json.dumps({**spec, "folder": name}))
        log = folder / "output.txt"
        with log.open("w") as output:
            process = subprocess.Popen(
                command(engine, processes, f"workers.{worker}", str(case)),
                cwd=ROOT,
                env=environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that a hanging launcher is ended together with its workers
            )
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        tail = log.read_text(errors="replace")[-6000:]
        assert status == 0, f"{engine} x {processes}: {'time limit' if status is None else f'exit {status}'}\n{tail}"
        return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(processes)]


def jobs(engine: str, processes: int) -> dict[str, list[Any]]:
    """Results per rank of all jobs of ``workers/jobs.py`` for an engine: optimizer and parity tests share a launch."""
    found = _jobs(engine, processes)
    if isinstance(found, AssertionError):
        raise found
    return found


@functools.cache
def _references() -> str:
    """A folder of this session: the weights to which a single process came."""
    folder = tempfile.mkdtemp(prefix="scaletransfer-references-")
    atexit.register(shutil.rmtree, folder)
    return folder


@functools.cache
def _jobs(engine: str, processes: int) -> dict[str, list[Any]] | AssertionError:
    """A launch that failed is kept as well: a second try for every test would fail as slowly."""
    from workers import optimizing, parity

    spec = {
        "optimizing": {} if engine in ("single", "ddp") else optimizing.CASES,
        "parity": parity.cases(engine, processes),
        "references": _references(),
    }
    if engine != "single":
        jobs("single", 1)  # which writes the references
    try:
        ranks = launch(engine, processes, "jobs", spec)
    except AssertionError as error:
        return error
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}

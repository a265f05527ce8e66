"""make_shards killed at any moment: nothing half-written has a final name, and the next run ends with the same bytes.

Processes are killed at random times and, since most of the time goes into images, also at chosen events: whenever one
of them opens, renames or removes a file in the output folder.  An audit hook that a `sitecustomize` module sets
counts those events, in workers as in the command itself.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers_data import SALT, make_chexpert
from test_shards import hashes

from scaletransfer.index import INDEX_NAME
from scaletransfer.shard_writer import WORK_FOLDER

REPOSITORY = Path(__file__).parents[1]
SHARD_SIZE = 25
# Every process that starts with this on its path kills its process group at the given event in the output folder.
HOOK = """
import os, signal, sys
limit, out, events = int(os.environ["KILL_AT"]), os.environ["KILL_OUT"], [0]
def hook(event, arguments):
    if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(arguments[0]).startswith(out):
        events[0] += 1
        if limit == 0:
            descriptor = os.open(os.environ["KILL_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(descriptor, b".")
            os.close(descriptor)
        elif events[0] == limit:
            os.killpg(0, signal.SIGKILL)
sys.addaudithook(hook)
"""


@dataclass(frozen=True)
class Data:
    """A drawn data set, and what an uninterrupted run made of it."""

    root: Path
    whole: Path
    files: dict[str, str]
    seconds: float
    events: int

    def start(self, out: Path, workers: int, **hook: str) -> subprocess.Popen[bytes]:
        """The command, as the leader of a process group of its own."""
        command = [sys.executable, "-m", "scaletransfer.make_shards", "chexpert", "--root", self.root, "--out", out]
        command += ["--salt-file", self.root.parent / "salt", "--workers", workers, "--shard-size", SHARD_SIZE]
        command += ["--size", "32"]
        path = f"{REPOSITORY}:{self.root.parent / 'hook'}" if hook else str(REPOSITORY)
        environment = os.environ | {"PYTHONPATH": path, "KILL_OUT": f"{out}/"} | hook
        return subprocess.Popen(
            [str(word) for word in command], env=environment, stdout=subprocess.DEVNULL, start_new_session=True
        )

    def finish(self, out: Path, workers: int) -> None:
        assert self.start(out, workers).wait(120) == 0


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    base = tmp_path_factory.mktemp("kill")
    root = make_chexpert(base / "r", rows=400, valid=40, laterals=False)
    (base / "salt").write_bytes(SALT)
    (base / "hook").mkdir()
    (base / "hook" / "sitecustomize.py").write_text(HOOK)
    made = Data(root, base / "whole", {}, 0.0, 0)
    start = time.monotonic()
    made.finish(made.whole, 2)
    seconds = time.monotonic() - start
    log = base / "log"
    assert made.start(base / "counted", 1, KILL_AT="0", KILL_LOG=str(log)).wait(120) == 0
    assert hashes(base / "counted") == hashes(made.whole)
    return Data(root, made.whole, hashes(made.whole), seconds, log.stat().st_size)


def sound(data: Data, out: Path) -> dict[str, int]:
    """Check what a killed run has left: the finished shards with the time of their file."""
    visible = {name: digest for name, digest in hashes(out).items() if "/" not in name and not name.endswith(".tmp")}
    for name, digest in visible.items():
        assert digest == data.files[name], f"{name} is not what it has to become"
    if INDEX_NAME in visible:
        assert visible == data.files, "the index came before its files"
    markers = (out / WORK_FOLDER).glob("*.tar.json")
    return {path.stem: (out / path.stem).stat().st_mtime_ns for path in markers}


def killed(data: Data, out: Path, workers: int, *, after: float = 0.0, event: int = 0) -> dict[str, int]:
    """Start the command and kill it, the workers with it or (by time) not; what `sound` says then."""
    if event:
        process = data.start(out, workers, KILL_AT=str(event))
    else:
        process = data.start(out, workers)
        time.sleep(after)
        process.send_signal(signal.SIGKILL)  # the command alone: its workers have to notice
    process.wait(120)
    deadline = time.monotonic() + 10
    while group_lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not group_lives(process.pid), "workers outlive the command"
    return sound(data, out)


def group_lives(leader: int) -> bool:
    """Whether a process of the group is at work; one that is dead and waits for its parent is not."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(group) == leader and state != "Z":
            return True
    return False


def points(data: Data, number: int, seed: int) -> list[tuple[int, float, int]]:
    """(workers, seconds, event) of every kill, times and events in turn."""
    rng = random.Random(seed)
    found = []
    for index in range(number):
        workers = 1 + index // 2 % 3
        if index % 2:
            share = rng.uniform(0.02, 1) if workers == 1 else rng.uniform(0.02, 0.6)  # workers have events of their own
            found.append((workers, 0.0, max(1, round(share * data.events))))
        else:
            found.append((workers, rng.uniform(0.25, 1) * data.seconds, 0))
    return found


def kill_and_go_on(data: Data, base: Path, number: int, seed: int) -> int:
    """`number` runs, each killed in an empty folder and then finished; how many were killed with shards finished."""
    partly = 0
    for index, (workers, after, event) in enumerate(points(data, number, seed)):
        out = base / f"out{index}"
        finished = killed(data, out, workers, after=after, event=event)
        ended = (out / INDEX_NAME).exists()
        partly += bool(finished) and not ended
        data.finish(out, 1 + index % 3)
        assert hashes(out) == data.files, f"kill {index} of {workers} workers: other bytes"
        assert not (out / WORK_FOLDER).exists()
        again = {name: (out / name).stat().st_mtime_ns for name in finished}
        assert again == finished, f"kill {index}: finished shards were written again"
    return partly


def test_killed_at_four_points(data, tmp_path):
    kill_and_go_on(data, tmp_path, 4, 7)


@pytest.mark.slow
def test_killed_at_twenty_points(data, tmp_path):
    assert kill_and_go_on(data, tmp_path, 20, 0) >= 5, "hardly a run was killed between two shards"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_again_and_again_it_ends(data, tmp_path, workers):
    """One folder through many kills: what is finished only grows."""
    out, rng, before = tmp_path / "out", random.Random(3), {}
    for _ in range(8):
        finished = killed(data, out, workers, event=rng.randrange(4, 40))
        if (out / INDEX_NAME).exists():
            break
        assert before.items() <= finished.items()
        before = finished
    assert len(before) > 2
    data.finish(out, workers)
    assert hashes(out) == data.files

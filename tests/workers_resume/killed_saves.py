"""Training whose saves are killed (SIGKILL) at random moments, each time gone on from the newest complete checkpoint.

A process of its own writes each save, as the thread would, and is killed before one of its calls into C, drawn at
random; those of the other ranks are killed with it, as a launcher does. Everything else of the job lives on, so that
one launch serves many kills.

Arguments: number of kills, seed, folder of the checkpoints, a folder for rank-<r>.json.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from workers_resume.network import FACTS, build, newest, result_file, train

from scaletransfer.engine.checkpoint import LATEST, open_checkpoint
from scaletransfer.engine.checkpoint_save import Job
from scaletransfer.engine.checkpoint_saver import Saver
from scaletransfer.engine.rehearsal import end_group
from scaletransfer.engine.strategy import asked

SMALL = 2048  # bytes that a write takes at once, so that files are torn in their middle


class Killed(Exception):
    """The process that wrote the save is dead."""


class KilledSaver(Saver):
    """Writes in a child. ``kill_at``: number of the call into C before which this rank's child kills itself."""

    kill_at: int | None = None
    calls = 0
    outcome = ""

    def _write(self, job: Job, held: IO[str] | None, ready: Callable[[], None] | None, waited: float) -> None:
        sign = job.root / f"killed-{job.token}"
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            count = 0

            def see(frame: Any, event: str, argument: Any) -> None:
                nonlocal count
                # waiting for the other ranks takes another number of calls each time
                if event == "c_call" and frame.f_code.co_name != "_collect":
                    count += 1
                    if count == self.kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)

            write = os.write
            os.write = lambda handle, data: write(handle, data[:SMALL])
            status = 1
            try:
                sys.setprofile(see)
                job.run()
                sys.setprofile(None)
                write(writer, str(count).encode())
                status = 0
            finally:
                os._exit(status)
        os.close(writer)
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if sign.exists():
                os.kill(child, signal.SIGKILL)
            time.sleep(0.002)
        if os.WIFSIGNALED(status):
            sign.touch()
            self.outcome = "killed"
            self._error = Killed()
        else:
            self.outcome = "written" if os.WEXITSTATUS(status) == 0 else "failed"
            self.calls = int(os.read(reader, 100) or 0)
        os.close(reader)
        if held is not None:
            held.close()


def main(kills: str, seed: str, where: str, out: str) -> None:
    torch.set_num_threads(1)
    strategy, root = asked(), Path(where)
    draw = random.Random(seed)  # the same on every rank
    engine = build(strategy, None)
    reference = [train(engine, step) for step in range(1, int(kills) + 3)]
    engine = build(strategy, None)
    saver = KilledSaver(engine, go_on=True, say=lambda text: None)
    losses = {1: train(engine, 1)}
    saver.save(root, 1, FACTS, keep=2)
    saver.wait()
    calls = saver.calls
    found: list[dict[str, Any]] = []
    step = 1
    for kill in range(1, int(kills) + 1):
        while step < kill + 1:
            step += 1
            losses[step] = train(engine, step)
        victim, part = draw.randrange(strategy.world), draw.random()
        if kill % 3 == 0:  # rank 0's last calls: the manifest, the marker, the names, what is pruned
            victim, part = 0, 1 - 0.25 * part**2
        saver.kill_at = 1 + int(part * calls) if strategy.rank == victim else None
        saver.save(root, step, FACTS, keep=2)
        saver._thread.join()  # not settled: who is dead tidies nothing up
        calls = saver.calls or calls
        engine.barrier()
        checkpoint = newest(root)
        assert checkpoint is not None and step - checkpoint.step >= 0
        for name in checkpoint.parts:
            checkpoint.read(name)
        named = open_checkpoint(root / (root / LATEST).read_text().strip())
        assert step - named.step >= 0
        found.append({"step": step, "victim": victim, "outcome": saver.outcome, "newest": checkpoint.step})
        engine.barrier()
        engine = build(strategy, checkpoint)
        saver = KilledSaver(engine, go_on=True, say=lambda text: None)
        step = checkpoint.step
    while step < len(reference):
        step += 1
        losses[step] = train(engine, step)
    differences = [abs(losses[step] - reference[step - 1]) for step in range(1, len(reference) + 1)]
    left = sorted(path.name for path in root.iterdir() if not path.name.startswith("killed-"))
    result_file(out).write_text(json.dumps({"kills": found, "differences": differences, "calls": calls, "left": left}))
    end_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

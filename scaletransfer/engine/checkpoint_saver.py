"""Saving while training goes on: the step waits for a copy of this rank's pieces, a thread of each rank writes it.

The threads communicate through the shared file system alone: collectives from two threads on one group can meet in
another order on every rank.
"""

from __future__ import annotations

import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from scaletransfer.config import CheckpointConfig
from scaletransfer.engine import checkpoint_save
from scaletransfer.engine.build import Engine
from scaletransfer.engine.checkpoint import folder_name
from scaletransfer.engine.checkpoint_copy import Staging, generator_bytes, parts, streamed
from scaletransfer.engine.checkpoint_save import Job
from scaletransfer.engine.pieces import STATES
from scaletransfer.engine.runlog import RunLog

TIMEOUT = 1800.0
"""Seconds that rank 0 waits for the other ranks' files."""
BEAT = 5.0
"""Seconds after which ranks that wait for a save tell each other that they are alive: a save may take longer than the
process group waits for a rank."""
GOES_ON = ", training goes on with the ones before it"
GRACE = 120.0
"""Seconds that a run which ends with an error waits for the save that is still running."""


class Away(Protocol):
    """What copies finished checkpoints elsewhere: see ``checkpoint_upload``."""

    def submit(self, folder: Path) -> set[Path]: ...
    def messages(self) -> list[str]: ...
    def finish(self, seconds: float) -> bool: ...


class Saver:
    """Saves an engine's state, one save at a time.

    Args:
        asynchronous: False: training waits until the checkpoint is on the disk, and nothing is copied.
        timeout: seconds that rank 0 waits for the files of the other ranks.
        go_on: training goes on after a save that failed; ``wait`` raises all the same.
        say: how rank 0 speaks. note: what it only writes down. tick: called every ``BEAT`` seconds while all wait.
        away: rank 0's.
    """

    @classmethod
    def of(
        cls, engine: Engine, settings: CheckpointConfig, log: RunLog, away: Away | None, tick: Callable[[], None]
    ) -> Saver:
        """As configured."""
        return cls(
            engine,
            asynchronous=settings.asynchronous,
            timeout=60 * settings.timeout_minutes,
            go_on=settings.on_failure == "continue",
            say=log.say,
            note=log.note,
            tick=tick,
            away=away,
        )

    def __init__(
        self,
        engine: Engine,
        *,
        asynchronous: bool = True,
        timeout: float = TIMEOUT,
        go_on: bool = False,
        say: Callable[[str], None] = print,
        note: Callable[[str], None] = lambda text: None,
        tick: Callable[[], None] = lambda: None,
        away: Away | None = None,
    ) -> None:
        self._engine = engine
        self._asynchronous = asynchronous
        self._timeout = timeout
        self._go_on = go_on
        self._say = say
        self._note = note
        self._tick = tick
        self._away = away
        self._staging = Staging(engine.device) if asynchronous else None
        self._job: Job | None = None
        """Since the last ``settle``."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._said = False
        self._report = ""
        self._missing: BaseException | None = None
        """Why the checkpoint that was last asked for is not there."""

    @property
    def bytes(self) -> int:
        """Host memory that is kept for copies."""
        return 0 if self._staging is None else self._staging.bytes

    def save(self, root: Path, step: int, facts: dict[str, Any], *, keep: int, with_momentum: bool = True) -> None:
        """Begin to write checkpoint ``step`` below ``root``; an earlier save is waited for. All ranks call this.

        Args:
            facts: JSON-able facts of the run that stand in the manifest (samples seen, order version, label names...).
            keep: number of complete checkpoints that stay.
            with_momentum: False for weights alone, without the states of random generators.

        Raises:
            OSError, ValueError: the earlier save failed, or this one where nothing is asynchronous; the checkpoints
                before it and ``latest`` stay as they are.
        """
        self.settle()
        began = time.monotonic()
        engine = self._engine
        engine.average_buffers()
        held, token, error = self._begin(root, step)
        if token is None:
            self._failed(error or OSError(f"the checkpoint of step {step} was not written: rank 0 could not"), step)
            return
        chosen = parts(engine, with_momentum)
        shapes = {name: list(shape) for name, shape in engine.shapes.items()}
        tensors = {f"{kind}.{name}": shape for kind in ("model", *STATES, "ema") for name, shape in shapes.items()}
        fixed = {**engine.buffers(), **engine.frozen()}
        tensors |= {f"model.{name}": list(tensor.shape) for name, tensor in fixed.items()}
        job = Job(
            root=root,
            step=step,
            token=token,
            rank=engine.rank,
            world=engine.world,
            keep=keep,
            names=[(part.name, part.start, part.stop) for part in chosen],
            data=lambda: streamed(chosen),
            generators=generator_bytes(engine) if with_momentum else {},
            head={"engine": engine.strategy.engine, "world": engine.world, "facts": facts},
            shapes=tensors,
            timeout=self._timeout,
        )
        if self._away is not None and with_momentum:
            job = replace(job, finished=self._away.submit)
        self._job = job
        ready: Callable[[], None] | None = None
        if self._staging is not None:
            copies, ready = self._staging.copy(chosen)
            job = replace(job, data=lambda: copies)
        waited = time.monotonic() - began
        # A daemon, so that an interpreter which has given up waiting can end.
        self._thread = threading.Thread(
            target=self._write, args=(job, held, ready, waited), name=f"checkpoint-{step}", daemon=True
        )
        self._thread.start()
        if not self._asynchronous:
            self.settle()

    def _begin(self, root: Path, step: int) -> tuple[IO[str] | None, str | None, BaseException | None]:
        """Rank 0 holds ``root`` and makes the hidden folder; all ranks learn what it is called, or that it failed."""
        engine, held, number, error = self._engine, None, 0, None
        if engine.rank == 0:
            number = secrets.randbits(62)
            try:
                held = checkpoint_save.hold(root)
                checkpoint_save.clear(root)
                checkpoint_save.hidden(root, step, f"{number:016x}").mkdir()
            except OSError as caught:
                error, number = caught, -1
                if held is not None:
                    held.close()
        (number,) = self._sum(number)
        return held, (None if number < 0 else f"{number:016x}"), error

    def _failed(self, error: BaseException, step: int) -> None:
        self._missing = error
        if not self._go_on:
            raise error
        if self._engine.rank == 0:
            self._say(self._sentence(error, step))

    def _write(self, job: Job, held: IO[str] | None, ready: Callable[[], None] | None, waited: float) -> None:
        """The thread: whatever goes wrong comes out in ``check``, ``settle`` or ``wait``."""
        began = time.monotonic()
        try:
            if ready is not None:
                ready()
            job.run()
        except Exception as error:  # it comes out in the training thread
            self._error = error
        finally:
            if held is not None:
                held.close()
        size = sum(4 * (stop - start) for _, start, stop in job.names)
        seconds = time.monotonic() - began
        self._report = (
            f"checkpoint of step {job.step}: {size / 1e6:.1f} MB of this rank, the step waited {waited:.2f} s for the "
            f"copy, on the disk {seconds:.2f} s later"
        )

    def check(self) -> None:
        """At each step's end: say or raise what went wrong meanwhile on this rank. Nothing is communicated.

        Raises:
            OSError, ValueError: the save failed and the run is to stop. A rank that could leave word for rank 0 leaves
                it to rank 0.
        """
        if self._away is not None:
            for message in self._away.messages():
                self._say(message)
        if self._thread is None or self._thread.is_alive():
            return
        if self._error is not None:
            assert self._job is not None
            if not self._go_on and (self._engine.rank == 0 or not self._job.told):
                self._said = True
                raise self._error
            if self._go_on and not self._said:
                self._said = True
                self._tell(self._error, self._job.step)
        else:
            self._note_report()

    def _note_report(self) -> None:
        if self._report and self._engine.rank == 0:
            self._note(self._report)
        self._report = ""

    def _tell(self, error: BaseException, step: int, how: str = GOES_ON) -> None:
        if self._engine.rank == 0:
            self._say(self._sentence(error, step, how))
        elif self._job is not None and not self._job.told:
            print(f"[rank {self._engine.rank}] {self._sentence(error, step, how)}", file=sys.stderr, flush=True)

    @staticmethod
    def _sentence(error: BaseException, step: int, how: str = GOES_ON) -> str:
        text = " ".join(str(error).split()) or type(error).__name__
        return f"the checkpoint of step {step} was not written{how}: {text}"

    def settle(self, *, strict: bool = False) -> None:
        """Wait for the save that was begun, if one was. All ranks call this.

        Raises:
            OSError, ValueError: it failed on some rank, and the run is to stop or this is ``strict``.
        """
        job, thread, engine = self._job, self._thread, self._engine
        if job is None or thread is None:
            return
        while True:
            thread.join(BEAT)
            running, failed = self._sum(thread.is_alive(), self._error is not None)
            if not running:
                break
            self._tick()
        if not failed:
            self._note_report()
            self._forget()
            self._missing = None
            return
        if engine.rank == 0:
            shutil.rmtree(job.temporary, ignore_errors=True)  # no rank writes there any more
        error = self._error or OSError(
            f"the checkpoint of step {job.step} was not written: the line of the rank that could not says why"
        )
        said = self._said
        self._forget()
        self._missing = error
        if strict or not self._go_on:
            raise error
        if not said:
            self._tell(error, job.step)

    def _sum(self, *numbers: int) -> list[int]:
        """Over the ranks; all ranks call this."""
        mine = torch.tensor(numbers, dtype=torch.int64, device=self._engine.device)
        return [int(number) for number in self._engine.sum_over_ranks(mine).tolist()]

    def _forget(self) -> None:
        self._job, self._thread, self._error, self._said = None, None, None, False

    def wait(self) -> None:
        """Wait until what was saved is complete, also elsewhere. All ranks call this, at a run's end.

        Raises:
            OSError, ValueError: the last save failed, also where training goes on after one that fails.
        """
        self.settle(strict=True)
        if self._missing is not None:
            raise self._missing
        while any(self._sum(self._away is not None and not self._away.finish(BEAT))):
            self._tick()
        if self._away is not None:
            for message in self._away.messages():
                self._say(message)

    def close(self) -> None:
        """However a run ends: let the save and the copy that run become complete. Raises and communicates nothing."""
        if self._thread is not None:
            assert self._job is not None
            self._thread.join(GRACE)
            if self._thread.is_alive():
                print(f"the checkpoint of step {self._job.step} is given up", file=sys.stderr, flush=True)
            elif self._error is not None and not self._said:
                self._tell(self._error, self._job.step, how="")
        if self._away is not None:
            self._away.finish(GRACE)
            for message in self._away.messages():
                self._say(message)


def save(
    engine: Engine, root: Path, step: int, facts: dict[str, Any], *, keep: int, with_momentum: bool = True
) -> Path:
    """Write checkpoint ``step`` below ``root`` and wait for it; see ``Saver.save``. All ranks call this."""
    Saver(engine, asynchronous=False).save(root, step, facts, keep=keep, with_momentum=with_momentum)
    return root / folder_name(step)

"""What surrounds a run that trains: its process group, signals that stop it, and the watch over the other ranks."""

from __future__ import annotations

import re
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from scaletransfer.cli import MENDABLE, Stopped, say_error, sentence_of
from scaletransfer.config import FailingConfig
from scaletransfer.engine import marks
from scaletransfer.engine.rehearsal import end_group, join
from scaletransfer.engine.stopping import Stopping
from scaletransfer.engine.strategy import Strategy
from scaletransfer.engine.watch import LOST, Watch, leave

MESSAGES = re.compile(r"gloo|NCCL|c10d|ProcessGroup|wait timeout|Connection (closed|reset)|[Tt]imed out|Broken pipe")
"""How errors of collectives read: gloo's are plain RuntimeErrors."""
LOOK = 45.0
"""Seconds in which another rank may find out which one is gone, once a message to it has failed."""


class Guard:
    """Around a command that trains, on every rank: ``with Guard(strategy, cfg.failing) as guard: ...``.

    On several ranks an error that leaves it ends the process, with one sentence that one rank says. Not entered, it is
    a guard that watches nothing and is never asked to stop, as for training by a call from Python.
    """

    def __init__(self, strategy: Strategy | None = None, settings: FailingConfig | None = None) -> None:
        self.strategy = strategy
        self.settings = settings or FailingConfig()
        rank = 0 if strategy is None else strategy.rank
        self.stopping = Stopping(f"rank {rank} on {marks.host()}" if strategy and strategy.world > 1 else "the run")
        self.watch: Watch | None = None
        self.folder: Path | None = None

    def __enter__(self) -> Guard:
        strategy = self.strategy
        assert strategy is not None
        try:
            self._meet(strategy)
        except RuntimeError as error:
            if strategy.world == 1 or not MESSAGES.search(str(error)):
                raise
            raise ValueError(
                f"rank {strategy.rank} on {marks.host()} could not meet the other ranks "
                f"({str(error).strip().splitlines()[0]}): one of them may have failed; where hosts have several "
                "networks, say in launch/environment.sh which to take (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
            ) from error
        self.stopping.install()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: TracebackType | None) -> None:
        if self.watch is not None and isinstance(error, Exception) and not isinstance(error, Stopped):
            self._fail(self.watch, error)
        if error is None or isinstance(error, Stopped):
            end_group()
        if self.watch is not None:
            self.watch.close()
        self.stopping.uninstall()

    def _meet(self, strategy: Strategy) -> None:
        join(strategy, timedelta(minutes=self.settings.timeout_minutes))
        if strategy.world > 1:
            where = (strategy.rank, strategy.world, strategy.local_rank, strategy.local_world)
            self.watch = Watch(*where, self.settings.timeout_minutes, self._orphaned)
            self.watch.failed = self._failed
            self.watch.start()

    def tick(self, step: int, phase: int) -> None:
        """This rank is now in this phase (watch.WAITING, ...) of this step."""
        if self.watch is not None:
            self.watch.tick(step, phase)

    def begin(self, folder: Path) -> None:
        """The run folder is there and training begins; all ranks call this."""
        self.folder = folder
        if self.strategy is not None and self.strategy.rank == 0:
            ranks = {0: (marks.host(), marks.process())} if self.watch is None else self.watch.who
            marks.write_start(folder, [ranks[rank] for rank in sorted(ranks)])

    def end(self, *, stopped_after: int | None = None) -> None:
        """Training is over. stopped_after: the step that was saved because of a signal. All ranks call this."""
        self.stopping.finish()
        if self.strategy is not None and self.strategy.rank == 0 and self.folder is not None:
            marks.write_end(self.folder, step=stopped_after, why=self.stopping.asked)

    def _orphaned(self) -> None:
        self.stopping.ask("no launcher any more (it has ended)")

    def _failed(self, sentence: str) -> None:
        if self.folder is not None:
            marks.write_failed(self.folder, sentence)

    def _fail(self, watch: Watch, error: Exception) -> NoReturn:
        """End this process because of an error: its own, or what another rank's end looks like from here."""
        import yaml

        mine = watch.name(watch.rank)
        if isinstance(error, RuntimeError) and MESSAGES.search(str(error)):
            self._cut_off(watch, error)
        if isinstance(error, (*MENDABLE, yaml.YAMLError)):
            if watch.rank:  # what rank 0 refuses all refuse, and it shall say so; it may be slower
                watch.wait(1.0 if watch.running else 10.0)

            def speak() -> None:
                line = say_error(error, f"[{mine}] " if watch.rank else "")
                self._failed(line.removeprefix("error: "))

            verdict = watch.claim(watch.rank, sentence_of(error), 2, speak)
            leave(verdict.status, verdict.sentence)
        sentence = f"{mine} failed: {type(error).__name__}: {sentence_of(error)}; its traceback stands above"

        def show() -> None:
            traceback.print_exception(error)
            watch.speak(sentence)

        verdict = watch.claim(watch.rank, sentence, LOST, show)
        leave(verdict.status, verdict.sentence)

    def _cut_off(self, watch: Watch, error: RuntimeError) -> NoReturn:
        """A collective failed: some rank is gone or late, and somebody may know which."""
        mine, first = watch.name(watch.rank), str(error).strip().splitlines()[0]
        verdict = watch.wait(3.0)
        if verdict is None:
            print(f"note: {mine} cannot reach another rank; looking which", file=sys.stderr, flush=True)
            verdict = watch.wait(LOOK)
        if verdict is None:
            behind, what = watch.late()
            names = ", ".join(watch.name(rank) for rank in behind[:4])
            why = f"{names} is {what}" if behind else "no rank is known to be gone or late"
            sentence = f"{mine} cannot reach the others: {why} ({first})"
            verdict = watch.claim(behind[0] if behind else -1, sentence, LOST)
        leave(verdict.status, verdict.sentence)

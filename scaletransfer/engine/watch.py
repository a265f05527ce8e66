"""Notices a rank that died, hangs, or failed, and ends this one with a sentence that names it.

Every rank says every few seconds, through the launcher's TCPStore, that it lives and how far it has come. Rank 0 looks
at all of them, every rank looks at rank 0, and at the processes of its own host, whose end the kernel reports at once.
The first to find something writes it into the store and says it; the others read it there and end without a word.

Two threads: one talks to the store and may hang with it, the other judges and never waits for anything.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, NoReturn

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from scaletransfer.cli import record
from scaletransfer.engine.marks import host

PHASES = ("starting", "waiting for data", "training", "writing its log", "validating", "saving")
STARTING, WAITING, TRAINING, LOGGING, VALIDATING, SAVING = range(len(PHASES))
LOST = 1
"""Exit status of a rank that ends because of another."""
GRACE = 3.0
"""Seconds that the main thread has to end by itself."""


@dataclass(frozen=True)
class Verdict:
    """Why the run ends. by: the rank that found it and says it; about: the rank that is to blame, or -1."""

    by: int
    about: int
    sentence: str
    status: int


@dataclass
class _Beat:
    """What is known of another rank. changed: when (monotonic) it last said something new."""

    number: int
    step: int
    phase: int
    moved: float
    """Its own clock (Unix time) when it last got on."""
    changed: float
    count: int = -1
    stood: float = 0.0
    """Since when (monotonic, ours) its ``count`` is the same."""


class Watch:
    """The watch of one rank over a run. ``start`` after the process group is there; ``close`` when all is done.

    Args:
        rank, world, local_rank, local_world: of this process.
        minutes: ``failing.timeout_minutes``. A rank that says nothing, or a run that does not get on, for 0.6 of it is
            lost; the rest is for the launchers.
        orphaned: called once, when the launcher of this process has ended.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        local_rank: int,
        local_world: int,
        minutes: float,
        orphaned: Callable[[], None] = lambda: None,
    ) -> None:
        self.rank, self.world = rank, world
        self._local = [rank - local_rank + n for n in range(local_world) if n != local_rank]
        self.minutes = minutes
        self._limit = 0.6 * 60 * minutes
        self._period = min(2.0, self._limit / 20)
        self._orphaned, self._parent = orphaned, os.getppid()
        self._progress = (0, STARTING, 0, time.time())
        self.who: dict[int, tuple[str, int]] = {rank: (host(), os.getpid())}
        """Host and process of the ranks: of all on rank 0, of those of this host elsewhere."""
        self.failed: Callable[[str], None] = lambda sentence: None
        """Called with the sentence by the rank that says it."""
        self._beats: dict[int, _Beat] = {}
        self._handles: dict[int, int] = {}
        self._heard = time.monotonic()
        self._trouble = ""
        self._closed = threading.Event()
        self._found = threading.Event()
        self._verdict: Verdict | None = None
        self._lock = threading.Lock()
        self._ask: Any = None

    def tick(self, step: int, phase: int) -> None:
        """This rank gets on: it is now in this phase of this step."""
        self._progress = (step, phase, self._progress[2] + 1, time.time())

    @property
    def running(self) -> bool:
        """Whether training has begun."""
        return self._progress[1] != STARTING

    def start(self) -> None:
        """Meet the others; all ranks must call this."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = timedelta(seconds=60 * self.minutes)
        attempt = f"scaletransfer/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        # one connection a thread: a client's calls wait for each other
        talk, ask = (
            PrefixStore(attempt, TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout))
            for _ in range(2)
        )
        self._ask = ask
        self._say(talk)
        talk.set(f"who/{self.rank}", json.dumps([host(), os.getpid(), _namespace()]))
        others = [r for r in range(self.world) if r != self.rank and (self.rank == 0 or r == 0 or r in self._local)]
        for rank, text in zip(others, talk.multi_get([f"who/{r}" for r in others]), strict=True):
            name, process, namespace = json.loads(text)
            self.who[rank] = (name, process)
            if namespace == _namespace():
                self._open(rank, process)
        short = timedelta(seconds=max(1.0, self._limit / 4))
        for store in (talk, ask):
            store.set_timeout(short)
        self._heard = time.monotonic()
        for target, arguments in ((self._talk, (talk,)), (self._judge, ())):
            threading.Thread(target=target, args=arguments, name="watch", daemon=True).start()

    def close(self) -> None:
        """This rank is done; the others shall not miss it."""
        self._closed.set()
        if self._ask is not None:  # where rank 0's launcher went first, nobody looks any more
            self._answer(lambda store: store.set(f"done/{self.rank}", "1"), None)

    def name(self, rank: int) -> str:
        """'rank 3 on n2 (process 4711)'."""
        known = self.who.get(rank)
        return f"rank {rank}" if known is None else f"rank {rank} on {known[0]} (process {known[1]})"

    def claim(self, about: int, sentence: str, status: int, speak: Callable[[], None] | None = None) -> Verdict:
        """Find why the run ends, unless somebody else has; the verdict that holds.

        speak: says it, called where this verdict holds and before any other thread hears of it and ends the process.
        """
        with self._lock:
            if self._verdict is not None:
                return self._verdict
            mine = json.dumps(asdict(Verdict(self.rank, about, sentence, status)))
            # where the store is out of reach each rank that is cut off speaks for itself
            kept = self._answer(lambda store: store.compare_set("verdict", "", mine), mine)
            if kept in (mine, mine.encode()):
                (speak or (lambda: self.speak(sentence)))()
            return self._take(kept)

    def speak(self, sentence: str) -> None:
        """Say it, and keep it in the run folder."""
        print(f"\nerror: {sentence}", file=sys.stderr, flush=True)  # below whatever progress bar stands there
        self.failed(sentence)

    def wait(self, seconds: float) -> Verdict | None:
        """The verdict, if there is one within so many seconds."""
        self._found.wait(seconds)
        return self._verdict

    def late(self) -> tuple[list[int], str]:
        """The ranks that have got least far, and what they do; ([], "") where all stand at the same place."""
        places = {rank: (beat.step, beat.phase) for rank, beat in self._beats.items()}
        places[self.rank] = self._progress[:2]
        first = min(places.values())
        behind = sorted(rank for rank, place in places.items() if place == first)
        if len(behind) == len(places):
            return [], ""
        moved = min(self._beats[r].moved if r != self.rank else self._progress[3] for r in behind)
        at = time.strftime("%H:%M:%S", time.localtime(moved))
        return behind, f"{PHASES[first[1]]} (step {first[0]}) since {at}"

    def _answer(self, ask: Callable[[Any], Any], without: Any) -> Any:
        """What the store answers, or ``without`` where it does not: some of its calls know no time limit."""
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def wait() -> None:
            try:
                answers.put(ask(self._ask))
            except RuntimeError as error:
                self._trouble = str(error).splitlines()[0]
                answers.put(without)

        threading.Thread(target=wait, name="watch", daemon=True).start()
        try:
            return answers.get(timeout=min(5.0, self._limit / 4))
        except queue.Empty:
            return without

    # ---- the thread that talks ------------------------------------------------------------------------------------

    def _say(self, store: Any, number: int = 0) -> None:
        step, phase, count, moved = self._progress
        store.set(f"beat/{self.rank}", json.dumps([number, step, phase, count, moved]))

    def _talk(self, store: Any) -> None:
        seen = [r for r in range(self.world) if r != self.rank] if self.rank == 0 else [0]
        number = 0
        while not self._closed.wait(self._period):
            number += 1
            try:
                self._say(store, number)
                texts = store.multi_get([f"beat/{r}" for r in seen])
                told = store.get("verdict") if store.check(["verdict"]) else None
            except RuntimeError as error:
                self._trouble = str(error).splitlines()[0]
                continue
            now = self._heard = time.monotonic()
            for rank, text in zip(seen, texts, strict=True):
                self._hear(rank, json.loads(text), now)
            if told is not None:
                with self._lock:
                    self._take(told)

    def _hear(self, rank: int, beat: list[Any], now: float) -> None:
        number, step, phase, count, moved = beat
        before = self._beats.get(rank)
        if before is None or before.number != number:
            stood = now if before is None or before.count != count else before.stood
            self._beats[rank] = _Beat(number, step, phase, moved, now, count, stood)

    def _take(self, text: str | bytes) -> Verdict:
        if self._verdict is None:
            self._verdict = Verdict(**json.loads(text))
            self._found.set()
        return self._verdict

    # ---- the thread that judges -----------------------------------------------------------------------------------

    def _judge(self) -> None:
        poll = select.poll()
        for handle in self._handles.values():
            poll.register(handle, select.POLLIN)
        ranks = {handle: rank for rank, handle in self._handles.items()}
        last = time.monotonic()
        own, stood = -1, last
        while True:
            ended = poll.poll(1000 * min(1.0, self._period)) if ranks else self._found.wait(min(1.0, self._period))
            if self._closed.is_set():
                return
            now = time.monotonic()
            if now - last > max(10.0, self._limit / 4):  # we were stopped ourselves: nobody is late by that
                self._heard = stood = now
                for beat in list(self._beats.values()):
                    beat.changed = beat.stood = now
            last = now
            if self._progress[2] != own:
                own, stood = self._progress[2], now
            if ranks:
                for handle, _ in ended:  # type: ignore[union-attr]
                    poll.unregister(handle)
                    self._ended(ranks.pop(handle))
            if os.getppid() != self._parent and self._parent != 0:
                self._parent = 0
                self._orphaned()
            if not self._found.is_set():
                self._look(now, stood)
            if self._found.is_set():
                self._end()
                return

    def _ended(self, rank: int) -> None:
        """A process of this host has ended: well, with a verdict, or without a word."""
        if self._answer(lambda store: store.check([f"done/{rank}"]), False):
            return
        if self.wait(2 * self._period) is None and not self._closed.is_set():
            sentence = (
                f"{self.name(rank)} is gone: it was killed (by somebody, or for lack of memory) or it crashed; the run "
                "ends, the same command goes on from the last checkpoint"
            )
            self.claim(rank, sentence, LOST)

    def _look(self, now: float, stood: float) -> Verdict | None:
        minutes = f"(failing.timeout_minutes is {self.minutes:g})"
        if now - self._heard > self._limit:
            sentence = (
                f"{self.name(self.rank)} has heard nothing from the launcher of rank 0 at {os.environ['MASTER_ADDR']} "
                f"for {now - self._heard:.0f} s {minutes}: that host is gone, or the network between them is"
                f"{f' ({self._trouble})' if self._trouble else ''}"
            )
            return self.claim(0, sentence, LOST)
        if now - self._heard > 4 * self._period:
            return None  # what we know of the others is old
        beats = list(self._beats.items())
        for rank, beat in beats:
            if now - beat.changed > self._limit:
                sentence = (
                    f"{self.name(rank)} has said nothing for {now - beat.changed:.0f} s {minutes}: its process is "
                    "stopped or hangs, its host is gone, or the network to it is"
                )
                return self.claim(rank, sentence, LOST)
        standing = [stood, *(beat.stood for _, beat in beats)]
        # building and saving have no measure; a save has a limit of its own, checkpoint.timeout_minutes
        phases = {self._progress[1], *(beat.phase for _, beat in beats)}
        running = not phases & {STARTING, SAVING}
        if self.rank == 0 and running and now - max(standing) > self._limit:
            behind, what = self.late()
            for_ = f"for {now - max(standing):.0f} s {minutes}"
            if behind:
                names = ", ".join(self.name(rank) for rank in behind[:4]) + (" and others" if len(behind) > 4 else "")
                sentence = f"no rank has got on {for_}: {names} is {what}, the others wait for it"
            else:
                where = f"{PHASES[self._progress[1]]} (step {self._progress[0]})"
                sentence = f"no rank has got on {for_}: all are {where}; a link between hosts or a device may hang"
            return self.claim(behind[0] if behind else -1, sentence, LOST)
        return None

    def _end(self) -> None:
        """End this process, and a silent one of this host, which its launcher would wait for."""
        verdict = self._verdict
        assert verdict is not None
        if verdict.by != verdict.about and verdict.about in self._handles:
            try:
                signal.pidfd_send_signal(self._handles[verdict.about], signal.SIGKILL)
            except ProcessLookupError:  # it has ended by itself
                os.close(self._handles.pop(verdict.about))
        if not self._closed.wait(GRACE):
            leave(verdict.status, verdict.sentence)

    def _open(self, rank: int, process: int) -> None:
        try:
            self._handles[rank] = os.pidfd_open(process)
        except OSError:
            # It has just ended, or the container forbids the call: its silence will tell, later.
            return


def leave(status: int, sentence: str) -> NoReturn:
    """End this process now. Its launcher repeats the sentence behind its own traceback."""
    record(sentence)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _namespace() -> str:
    """In which a process id means the same process: this host, this boot of it, this container."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{host()} {file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{host()} {os.getpid()}"

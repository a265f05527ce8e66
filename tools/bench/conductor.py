"""Programs that are measured in turn: each runs for a second or two while all others are stopped, round after round.

So a machine that becomes slower or busier for a while is slow for all of them alike. A program is a process (with
whatever processes it starts) that speaks `peers/protocol.py`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import IO, Any

TOOLS = Path(__file__).resolve().parents[1]
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"), "1"
)
"""No program may use more cores than the workers that it was given."""
_ERROR_LINES = 3
_GRACE = 4.0  # seconds that a program has to end


@dataclass(kw_only=True)
class Program:
    """One measured program. name: for people. command: without the settings, which are its last argument."""

    name: str
    command: Sequence[str]
    settings: dict[str, Any]
    rates: list[float] = field(default_factory=list)
    """Images per second of each round."""
    cpu: list[float] = field(default_factory=list)
    """Seconds of processor time per image of each round, all its processes together."""
    rss: float = 0.0
    """MB: the largest resident sizes of its processes, added up."""
    pss: float = 0.0
    """MB at the end, what several processes share counted once."""
    batches: str = ""
    """What a batch is."""
    failure: str = ""
    """Why it gave no numbers."""
    _process: subprocess.Popen[bytes] | None = None
    _errors: IO[bytes] | None = None

    @property
    def rate(self) -> float:
        """The median; 0 where there is none."""
        return median(self.rates) if self.rates else 0.0

    def start(self, folder: Path) -> None:
        """Start it and wait until it has warmed up, then stop it (SIGSTOP)."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `end`)
        # PYTHONPATH: a program's own environment and the protocol is all that it may see
        environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(TOOLS)}
        self._process = subprocess.Popen(
            [*self.command, json.dumps(self.settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            cwd=folder,
            start_new_session=True,  # its processes are stopped and ended together
        )
        answer = self._answer()
        if answer is not None:
            self.batches = answer["batches"]
        self._signal(signal.SIGSTOP)

    def measure(self, seconds: float) -> None:
        """One round; nothing where it has failed."""
        if self.failure or self._process is None or self._process.stdin is None:
            return
        before = self._processor_time()
        self._signal(signal.SIGCONT)
        with suppress(BrokenPipeError):  # _answer says why
            self._process.stdin.write(f"go {seconds}\n".encode())
            self._process.stdin.flush()
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        if answer is not None:
            self.rates.append(answer["images"] / answer["seconds"])
            self.cpu.append((self._processor_time() - before) / answer["taken"])
            self._look_at_memory()

    def end(self) -> None:
        """End all its processes: by themselves, so that they can clean up, or else by force."""
        if self._process is not None:
            with suppress(BrokenPipeError, subprocess.TimeoutExpired):
                assert self._process.stdin is not None
                self._process.stdin.close()
                self._signal(signal.SIGCONT)
                self._process.wait(_GRACE)
            self._signal(signal.SIGKILL)
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout, self._errors):
                if stream is not None:
                    with suppress(BrokenPipeError):
                        stream.close()
            self._process = None

    def _answer(self) -> dict[str, Any] | None:
        assert self._process is not None and self._process.stdout is not None and self._errors is not None
        line = self._process.stdout.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self.failure = "ended: " + " / ".join(lines[-_ERROR_LINES:])
        return None

    def _signal(self, number: int) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):  # it has ended; _answer says why
            os.killpg(self._process.pid, number)

    def _processor_time(self) -> float:
        """Seconds, of all its processes; the system counts hundredths."""
        assert self._process is not None
        ticks = sum(int(fields[11]) + int(fields[12]) for fields in _of_session(self._process.pid).values())
        return ticks / os.sysconf("SC_CLK_TCK")

    def _look_at_memory(self) -> None:
        assert self._process is not None
        rss = pss = 0.0
        for process in _of_session(self._process.pid):
            rss += _kilobytes(process / "status", "VmHWM:")
            pss += _kilobytes(process / "smaps_rollup", "Pss:")
        self.rss, self.pss = max(self.rss, rss / 1024), pss / 1024


def run(
    programs: Sequence[Program],
    rounds: int,
    seconds: float,
    folder: Path,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Start all, measure each `rounds` times in turn, end all. What fails has `failure`, the others go on."""
    try:
        for program in programs:
            if not program.failure:
                say(f"starting {program.name}")
                program.start(folder)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for program in programs:
                program.measure(seconds)
    finally:
        for program in programs:
            program.end()


def _of_session(leader: int) -> dict[Path, list[str]]:
    """The folder in /proc of each process of a session, and the fields of its `stat` after the name."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            # the name, in parentheses, may hold spaces; state, parent, group and session follow it
            fields = (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader:
            found[process] = fields
    return found


def _kilobytes(path: Path, name: str) -> float:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) for line in lines if line.startswith(name)), 0.0)

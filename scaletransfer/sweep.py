"""`scaletransfer sweep SWEEP.yaml --out DIR`: fine-tuning runs of a grid, models x targets x shots x seeds.

    models: [scratch, pretrained_models/imagenet21k_bit50x1]
    targets:
      - images: datasets/animals
      - config: configs/finetune/pets.yaml
    shots: [1, 5, full]
    seeds: [0, 1, 2]
    overrides: {optimizer.lr: 0.003}

Every run is an ordinary fine-tuning run, in DIR/runs/<target>/<model>/<shot>/<seed>/. DIR/results.csv has a row for
each finished run and metric (`scaletransfer report DIR/results.csv`), DIR/failures.csv one for each run that failed, or
for which a class has too few images. The same command goes on after whatever has ended it; given several times at once,
also on several hosts that share DIR, the runs are shared out. SIGTERM, SIGUSR1 or Ctrl-C stop all runs after their
step, saved, with exit status 75; status 1 says that runs have failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from scaletransfer import memory
from scaletransfer.cli import CommandParser, Stopped, run_command
from scaletransfer.config import describe
from scaletransfer.config.sweep import SweepConfig, SweepModelConfig, SweepTargetConfig, read_sweep
from scaletransfer.decoded import taken_by
from scaletransfer.engine.stopping import SAME
from scaletransfer.results import Result
from scaletransfer.sweep_folder import (
    CACHE,
    FAILURES,
    RESULTS,
    check_asked,
    check_folder,
    failure_of,
    forget_failure,
    state_of,
    tidy,
    write_failure,
    write_tables,
)
from scaletransfer.sweep_grid import Run, check_grid, make_grid
from scaletransfer.sweep_work import Outcome, Worker

PATIENCE = 20
"""Seconds at the end in which a run that another process works on may come free: that of a sweep that was killed."""
TABLES_EVERY = 5.0
"""Seconds between two writings of the tables, which read all results."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Asked:
    """Whether the sweep was asked to stop, by signals while ``listening``."""

    def __init__(self) -> None:
        self.by = ""
        self.again = False
        self._since = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals; a second one, unless it is a copy of the first, asks to end at once."""

        def got(number: int, _: object) -> None:
            if not self.by:
                self.by, self._since = signal.Signals(number).name, time.monotonic()
            elif time.monotonic() - self._since > SAME:
                self.again = True

        before = {number: signal.signal(number, got) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Conductor:
    """Hands runs to processes and keeps what comes back.

    Args:
        runs: the whole grid, for the tables. devices: of each process, see ``Worker``. threads: of each.
    """

    def __init__(self, out: Path, runs: Sequence[Run], devices: Sequence[str | None], threads: int, keep: str) -> None:
        self.out, self.runs, self.keep = out, runs, keep
        self.devices, self.threads = devices, threads
        self.written, self.ended, self.told = 0.0, 0, False
        self.again: set[str] = set()

    def carry_out(self, todo: Sequence[Run], asked: Asked) -> None:
        """All runs of ``todo``, but for those that another process works on to the last."""
        waiting, busy = deque(todo), deque[Run]()
        self.again = {run.title for run in todo if state_of(run) == "failed"}
        workers = [Worker(device, self.threads) for device in self.devices[: len(todo)]]
        bar = tqdm(total=len(self.runs), initial=len(self.runs) - len(todo), unit="run", dynamic_ncols=True)
        idle = 0
        try:
            while not asked.by or self._stopping(workers, asked):
                for place, worker in enumerate(workers):
                    workers[place] = self._attend(worker, waiting, busy, bar, asked)
                if not waiting and not any(worker.run for worker in workers):
                    if not busy or idle == PATIENCE:
                        break
                    idle += 1
                    time.sleep(1)
                    waiting, busy = busy, deque()
                self._show(workers, bar)
                wait([worker.connection for worker in workers if worker.run], timeout=0.5)
                self._write_now_and_then()
        finally:
            for worker in workers:
                worker.close(kill=sys.exc_info()[0] is not None or asked.again)
            bar.close()
        if left := [run.title for run in busy if state_of(run) != "finished"]:
            print(f"another process works on {', '.join(left)}")

    def _stopping(self, workers: Sequence[Worker], asked: Asked) -> bool:
        """Ask the runs to stop, once; whether some still go on."""
        active = [worker for worker in workers if worker.run]
        for worker in active if not self.told else []:
            worker.ask_to_stop()
        self.told = True
        return bool(active) and not asked.again

    def _attend(self, worker: Worker, waiting: deque[Run], busy: deque[Run], bar: tqdm[Any], asked: Asked) -> Worker:
        """Keep what a process has done and give it more; the process, or another one in its place."""
        if worker.run is not None and (outcome := worker.outcome()) is not None:
            run, worker.run = worker.run, None
            if asked.by and outcome.state == "failed" and not worker.process.is_alive():
                outcome = Outcome(state="stopped")  # the signal came before the run listened
            self._keep(run, outcome, waiting, busy, bar, stopping=bool(asked.by))
            if outcome.spoilt and not asked.by:
                worker.close(kill=True)
                worker = Worker(worker.device, self.threads)
        while worker.run is None and waiting and not asked.by:
            run = waiting.popleft()
            if state_of(run) == "finished" or (state_of(run) == "failed" and run.title not in self.again):
                bar.update()  # another process was quicker
            else:
                worker.begin(run)
        return worker

    def _keep(
        self, run: Run, outcome: Outcome, waiting: deque[Run], busy: deque[Run], bar: tqdm[Any], *, stopping: bool
    ) -> None:
        if outcome.state == "busy":
            busy.append(run)
        elif outcome.state == "stopped":
            if not stopping:  # somebody stopped this process alone: the run goes on
                waiting.append(run)
        elif outcome.state == "failed":
            write_failure(run, outcome.sentence)
            bar.write(f"{run.title}: failed: {outcome.sentence}")
            bar.update()
            self.ended += 1
        else:
            forget_failure(run)
            tidy(run, self.keep)
            bar.write(f"{run.title}: finished {outcome.sentence or f'in {outcome.seconds:.0f} s'}")
            bar.update()
            self.ended += 1

    def _show(self, workers: Sequence[Worker], bar: tqdm[Any]) -> None:
        running = [worker.run.title for worker in workers if worker.run]
        more = f" and {len(running) - 1} more" if len(running) > 1 else ""
        bar.set_postfix_str(f"{running[0]}{more}" if running else "", refresh=False)

    def _write_now_and_then(self) -> None:
        if self.ended and time.monotonic() - self.written > TABLES_EVERY:
            write_tables(self.out, self.runs)
            self.written, self.ended = time.monotonic(), 0


def summary(out: Path, runs: Sequence[Run], results: Sequence[Result]) -> list[str]:
    """What has become of the grid, in lines."""
    states = Counter(state_of(run) for run in runs)
    counts = ", ".join(f"{states[name]} {name}" for name in ("failed", "skipped", "begun", "waiting") if states[name])
    lines = [f"{out}: {states['finished']} of {len(runs)} runs finished" + (f", {counts}" if counts else "")]
    for state in ("failed", "skipped"):
        reasons = Counter(run.skipped if state == "skipped" else failure_of(run)["sentence"] for run in of(runs, state))
        lines += [f"  {state} ({count}): {sentence}" for sentence, count in reasons.most_common(5)]
    if states["failed"]:
        lines.append(f"  all of them are in {out / FAILURES}; --retry-failed tries them again")
    if results:
        lines.append(f"results: scaletransfer report {out / RESULTS}")
    if kept := taken_by(out / CACHE):
        lines.append(f"decoded images take {kept / 1e9:.2f} GB in {out / CACHE}, which may be deleted")
    return lines


def of(runs: Sequence[Run], state: str) -> list[Run]:
    """The runs in a state."""
    return [run for run in runs if state_of(run) == state]


def defaults(out: Path, processes: int, cache_gb: float) -> dict[str, Any]:
    """Keys that suit many runs side by side, where the sweep file does not set them. None of them changes a result."""
    cores = len(os.sched_getaffinity(0))
    values: dict[str, Any] = {"data.workers": max(0, min(4, cores // processes - 1))}
    if cache_gb:
        values |= {"data.cache": str(out / CACHE), "data.cache_gb": cache_gb}
    if not torch.cuda.is_available():
        values["memory_gb"] = memory.installed() // 2 // processes / 1e9
    return values


def devices_of(processes: int | None) -> list[str | None]:
    """What each process sees of the GPUs: one, in turn; None for each on a machine without."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    names = seen.split(",")[:count] if seen else [str(number) for number in range(count)]
    if not names:
        return [None] * (processes or 1)
    return [names[number % len(names)] for number in range(processes or len(names))]


def part(text: str) -> tuple[int, int]:
    """(I, N) of "I/N"."""
    first, _, second = text.partition("/")
    if not (first.isdigit() and second.isdigit() and int(first) < int(second)):
        raise ValueError(f"--index must be I/N with I from 0 to N - 1, not {text!r}")
    return int(first), int(second)


def _parser() -> CommandParser:
    schema = "\n".join(
        f"{title}\n{describe(cls).partition(chr(10))[2]}"
        for title, cls in (
            ("keys of the sweep file:", SweepConfig),
            ("of each of its models:", SweepModelConfig),
            ("of each of its targets:", SweepTargetConfig),
        )
    )
    parser = CommandParser(
        prog="scaletransfer sweep",
        description=__doc__,
        epilog=schema,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="the grid; paths in it are seen from here")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the sweep")
    parser.add_argument("--processes", type=int, metavar="N", help="runs at a time (default: one a GPU; without, 1)")
    parser.add_argument("--list", action="store_true", help="show every run and what has become of it, and stop")
    parser.add_argument("--merge", action="store_true", help="make the tables of what there is, and stop")
    parser.add_argument("--retry-failed", action="store_true", help="try failed runs again")
    parser.add_argument("--index", default="0/1", metavar="I/N", help="only every N-th run, from the I-th on (from 0)")
    parser.add_argument(
        "--cache-gb", type=float, default=20.0, metavar="GB", help="most disk for decoded images; 0: none (default 20)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises ValueError for what a person can mend."""
    options = _parser().parse_args(sys.argv[1:] if argv is None else list(argv))
    out, (first, step) = options.out, part(options.index)
    if options.processes is not None and options.processes < 1:
        raise ValueError(f"--processes must be 1 or more, not {options.processes}")
    if not 0 <= options.cache_gb < float("inf"):
        raise ValueError(f"--cache-gb must be 0 or more, not {options.cache_gb}")
    sweep = read_sweep(options.sweep)
    check_folder(out)
    devices = devices_of(options.processes)
    grid = make_grid(sweep, out, defaults(out, len(devices), options.cache_gb))
    runs = check_grid(sweep, grid)
    for run in runs:
        check_asked(run)
    if options.list:
        _list(runs)
        return 0
    asked = Asked()
    if not options.merge:
        wanted = ("waiting", "begun", *(["failed"] if options.retry_failed else []))
        for run in runs:
            tidy(run, sweep.common.keep)
        todo = [run for run in runs[first::step] if state_of(run) in wanted]
        # get_num_threads: OMP_NUM_THREADS, where that is set
        threads = max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) // len(devices)))
        where = "CPU" if devices[0] is None else f"GPUs {', '.join(sorted({str(device) for device in devices}))}"
        print(f"{out}: {len(todo)} of {len(runs)} runs to do, {len(devices)} at a time ({where})", flush=True)
        conductor = Conductor(out, runs, devices, threads, sweep.common.keep)
        with asked.listening():
            conductor.carry_out(todo, asked)
    results = write_tables(out, runs)
    print("\n".join(summary(out, runs, results)))
    if asked.by:
        raise Stopped(f"{asked.by} stopped the sweep; the same command goes on")
    left = 0 if not options.merge else len(of(runs, "begun")) + len(of(runs, "waiting"))
    return 1 if left or of(runs, "failed") else 0


def _list(runs: Sequence[Run]) -> None:
    width = max(len(run.title) for run in runs)
    for run in runs:
        state = state_of(run)
        why = run.skipped if state == "skipped" else failure_of(run)["sentence"] if state == "failed" else ""
        print(f"{run.title:{width}}  {state}{': ' if why else ''}{why}")
    print(", ".join(f"{count} {state}" for state, count in Counter(state_of(run) for run in runs).items()))


if __name__ == "__main__":
    sys.exit(run_command(main))

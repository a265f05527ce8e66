"""Processes that carry out the runs of a sweep, one run at a time each; on a machine with GPUs each has one.

A process stays for many runs, as starting one takes longer than a short run. What goes wrong inside a run is its
outcome; a process that dies takes its run with it, and no other.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import torch
import yaml

from scaletransfer.cli import MENDABLE, Stopped, sentence_of
from scaletransfer.engine.guard import Guard
from scaletransfer.engine.strategy import asked
from scaletransfer.finetune import run_finetune
from scaletransfer.results import RESULT
from scaletransfer.sweep_folder import claimed, write_asked
from scaletransfer.sweep_grid import Run

OUTPUT = "output.txt"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended. busy: another process works on it. spoilt: the process had better not carry out another one."""

    state: Literal["finished", "failed", "stopped", "busy"]
    sentence: str = ""
    seconds: float = 0.0
    spoilt: bool = False


class Worker:
    """A process, from the side of the one that started it.

    Args:
        device: what CUDA_VISIBLE_DEVICES is to be; None leaves it. threads: of PyTorch on the CPU.
    """

    def __init__(self, device: str | None, threads: int) -> None:
        self.device, self.threads = device, threads
        self.run: Run | None = None
        context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, os.getpid(), device, threads))
        self.process.start()
        theirs.close()

    def begin(self, run: Run) -> None:
        """Hand over a run."""
        self.run = run
        with contextlib.suppress(OSError):  # it is dead, which `outcome` will say
            self.connection.send(run)

    def outcome(self) -> Outcome | None:
        """How the run has ended, None while it goes on; what a dead process leaves is a failure."""
        alive = self.process.is_alive()  # first: what it sends before it ends is there to be read
        try:
            if self.connection.poll():
                found: Outcome = self.connection.recv()
                return found
        except (EOFError, ConnectionResetError):
            self.process.join()
            alive = False
        if alive:
            return None
        code = self.process.exitcode or 0
        how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"status {code}"
        why = ": the machine may be short of memory, try fewer --processes" if code == -signal.SIGKILL else ""
        return Outcome(state="failed", sentence=f"its process was ended by {how}{why}", spoilt=True)

    def ask_to_stop(self) -> None:
        """End after the step that it is in, saved."""
        if self.process.is_alive():
            self.process.terminate()

    def close(self, *, kill: bool = False) -> None:
        """End the process; one with nothing to do ends by itself."""
        with contextlib.suppress(OSError):
            self.connection.send(None)
        if kill:
            self.process.kill()
        self.process.join()
        self.connection.close()


def work(connection: Connection, parent: int, device: str | None, threads: int) -> None:
    """The process: runs come, outcomes go, until None comes or the parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent says what is to be done
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:
        return
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while (run := connection.recv()) is not None:
            outcome = carry_out(run)
            connection.send(outcome)
            if outcome.spoilt:
                return


def carry_out(run: Run) -> Outcome:
    """Start or continue a run in this process, and say how it ended; what it prints goes into its folder."""
    began = time.monotonic()
    try:
        with claimed(run) as mine:
            if not mine:
                return Outcome(state="busy")
            if (run.folder / RESULT).is_file():  # another process was quicker
                return Outcome(state="finished", sentence="by another process")
            write_asked(run)
            with _printing_to(run.folder / OUTPUT):
                return _carried_out(run, began)
    except OSError as error:
        return Outcome(state="failed", sentence=sentence_of(error), seconds=time.monotonic() - began)


def _carried_out(run: Run, began: float) -> Outcome:
    strategy = asked(cuda=torch.cuda.is_available())
    state: Literal["finished", "failed", "stopped"] = "failed"
    sentence, spoilt = "", False
    try:
        with Guard(strategy, run.cfg.failing) as guard:
            run_finetune(run.folder, run.cfg, run.pretrain, run.pretrain_name, strategy, guard)
        state = "finished"
    except Stopped as error:
        state, sentence = "stopped", str(error)
    except (*MENDABLE, yaml.YAMLError) as error:
        traceback.print_exc()
        sentence = sentence_of(error)
    except Exception as error:
        traceback.print_exc()
        # a CUDA error, or a defect: what it leaves behind in this process is not known
        sentence, spoilt = f"{type(error).__name__}: {sentence_of(error)}", True
    gc.collect()
    if not strategy.cpu and not spoilt:
        torch.cuda.empty_cache()
    return Outcome(state=state, sentence=sentence, seconds=time.monotonic() - began, spoilt=spoilt)


@contextlib.contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """Everything that this process and its children print goes to the end of a file."""
    before = [(stream, os.dup(stream.fileno())) for stream in (sys.stdout, sys.stderr)]
    with path.open("ab") as file:
        for stream, _ in before:
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    try:
        yield
    finally:
        for stream, handle in before:
            stream.flush()
            os.dup2(handle, stream.fileno())
            os.close(handle)

"""Stopping on a signal: SIGTERM or SIGUSR1 to any one rank lets all ranks finish their step, save once, and end.

The ranks agree without a message of their own: whoever was asked adds 1 to a second number in the small all-reduce
that every step begins with (``step.global_count``), and all read the sum at the end of that step. By then the device
has long made it, so that the host waits for nothing that is still queued.

A signal is noticed by a thread, not by Python's own handlers: those run in the main thread only, between two bytecodes,
and it may be inside a collective that never returns.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import torch
from torch import Tensor

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME = 5.0
"""Seconds within which a second signal is taken for the first: a batch system signals the launcher, which signals its
workers, and these themselves."""


class Late:
    """An integer that the device is about to make, on its way to the host. Made right behind the work that makes it."""

    def __init__(self, value: Tensor) -> None:
        self._event = None
        self._value = value
        if value.device.type == "cuda":
            self._value = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> int:
        """The number; waits until the device has made it, not for what was queued behind it."""
        if self._event is not None:
            self._event.synchronize()
        return int(self._value)


class Stopping:
    """Whether this process was asked to stop. ``install`` makes signals ask; without it nothing does."""

    def __init__(self, name: str = "this process") -> None:
        self.name = name
        self.asked = ""
        """Who asked, for the log; "" as long as nobody has."""
        self._since = 0.0
        self._finished = False
        self._before: dict[int, object] = {}
        self._pipe: tuple[int, int] | None = None

    def ask(self, who: str) -> None:
        """Ask to stop after this step, once."""
        if not self.asked:
            self.asked, self._since = who, time.monotonic()
            print(f"{self.name} got {who}: all ranks will stop after this step and save", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """All is saved: a further signal, such as a launcher sends when its first process has ended, is late."""
        self._finished = True

    def install(self) -> None:
        """Take over the signals. Only the main thread of a program may do so; elsewhere signals keep their meaning."""
        if threading.current_thread() is not threading.main_thread() or self._pipe is not None:
            return
        self._pipe = read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, _leave_to_the_thread)
        os.register_at_fork(after_in_child=self._in_child)
        threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True).start()

    def uninstall(self) -> None:
        """Give the signals back."""
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            for number, before in self._before.items():
                signal.signal(number, before)  # type: ignore[arg-type]
            os.close(self._pipe[1])  # which ends the thread
            self._pipe = None

    def _listen(self, read: int) -> None:
        while numbers := os.read(read, 64):
            for number in numbers:
                if number in SIGNALS:
                    self._got(signal.Signals(number))
        os.close(read)

    def _got(self, number: signal.Signals) -> None:
        if not self.asked:
            self.ask(number.name)
        elif not self._finished and time.monotonic() - self._since > SAME:
            print(f"{self.name} got {number.name} again: it ends at once", file=sys.stderr, flush=True)
            os._exit(128 + number)

    def _in_child(self) -> None:
        """A loader process must neither report its own signals as ours nor survive SIGTERM."""
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            self._pipe = None


def _leave_to_the_thread(*_: object) -> None:
    """Python writes the signal's number to the wake-up pipe before it calls this."""

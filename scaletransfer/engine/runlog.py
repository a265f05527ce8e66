"""What a run writes about itself: metrics.jsonl (every step), TensorBoard, log.txt, a progress bar on rank 0."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

METRICS = "metrics.jsonl"
TEXT = "log.txt"
LOCK = "lock"


def check_writable(folder: Path) -> None:
    """ValueError where the run folder could not be made or written; nothing is made."""
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        why = "may not be written" if nearest.is_dir() else "is a file"
        raise ValueError(
            f"the run folder {folder} cannot be written ({nearest} {why}): set another run_dir or name (for "
            "fine-tuning, --logdir)"
        )


def claim(folder: Path) -> IO[str]:
    """Make the run folder and hold it for this process; what is returned must stay open. Rank 0 calls this.

    The lock is POSIX's: it belongs to the process alone (loader processes do not inherit it) and ends with it, however
    the process ends.

    Raises:
        ValueError: another process trains in this folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = (folder / LOCK).open("w", encoding="utf-8")
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            handle.close()
            raise ValueError(
                f"another process trains in {folder}: wait for it, end it, or give this run another name (name=...; "
                "for fine-tuning, --logdir)"
            ) from error
        # Some network file systems have no locks: then nothing keeps two runs apart but the person who starts them.
    return handle


def keep_until(path: Path, step: int) -> None:
    """Drop the rows of steps behind ``step`` from a metrics file, and a half-written last line. Atomic."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # the process was killed while it wrote this line
        if row["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def validated(folder: Path, step: int) -> bool:
    """Whether the metrics file has the validation of a step."""
    path = folder / METRICS
    if not path.exists():
        return False
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.startswith('{"event": "validation"') and line.endswith("\n") and json.loads(line)["step"] == step:
                return True
    return False


class RunLog:
    """Rank 0's records. Other ranks make one with ``active=False``, which writes nothing.

    Args:
        folder: the run folder. step: the step from which the run goes on; later rows are dropped. total: its last step.
    """

    def __init__(self, folder: Path, step: int, total: int, *, active: bool, tensorboard: bool) -> None:
        self._file, self._writer, self._bar, self._text = None, None, None, None
        if not active:
            return
        keep_until(folder / METRICS, step)
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        self._text = (folder / TEXT).open("a", encoding="utf-8")
        self.note(f"from step {step} to step {total}")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        self._bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True)

    def row(self, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        if self._file is not None:
            self._file.write(json.dumps(values) + "\n")

    def scalars(self, step: int, values: dict[str, float | None]) -> None:
        """Points in TensorBoard; values that are not there (None, NaN) are left out."""
        if self._writer is not None:
            for name, value in values.items():
                if value is not None and value == value:
                    self._writer.add_scalar(name, value, step)

    def advance(self, steps: int, text: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(steps)

    def say(self, text: str) -> None:
        """Print a line above the progress bar, on rank 0, and keep it in log.txt."""
        if self._bar is not None:
            self._bar.write(text)
        self.note(text)

    def note(self, text: str) -> None:
        """A line of log.txt with the time (UTC)."""
        if self._text is not None:
            self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} {text}\n")

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()
        if self._text is not None:
            self._text.flush()
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        self.flush()
        for thing in (self._file, self._text, self._writer, self._bar):
            if thing is not None:
                thing.close()

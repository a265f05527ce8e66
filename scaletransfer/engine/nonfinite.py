"""A step whose loss or gradient is NaN or infinite: its batch is kept, the step left out or the run ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scaletransfer.engine import marks
from scaletransfer.engine.runlog import RunLog


@dataclass(frozen=True)
class Nonfinite:
    """Such a step, the same on every rank. left_out: nothing was updated."""

    step: int
    loss: float
    norm: float
    keys: list[str]
    positions: list[int]
    left_out: bool

    def keep(self, folder: Path, log: RunLog, *, rank0: bool) -> None:
        """Write what is needed to see the batch again."""
        event = "skipped" if self.left_out else "not finite"
        log.row({"event": event, "step": self.step, "loss": str(self.loss), "keys": self.keys})
        if rank0:
            facts = {"loss": str(self.loss), "grad_norm": str(self.norm), "skipped": self.left_out}
            marks.write_nonfinite(folder, self.step, {**facts, "positions": self.positions, "keys": self.keys})

    def judge(self, folder: Path, log: RunLog, number: int, most: int) -> None:
        """Go on with a step that was left out, the ``number``-th of ``most``.

        Raises:
            ValueError: it was not, or is one too many.
        """
        name = marks.nonfinite_name(self.step)
        if self.left_out and number <= most:
            return log.say(
                f"step {self.step}: the loss is {self.loss} or its gradient not finite: left out ({number} of at most "
                f"{most}, failing.skip_nonfinite); its samples stand in {name}"
            )
        which = f"the loss of step {self.step} is {self.loss} and its gradient norm {self.norm}"
        if self.left_out:
            which = f"step {self.step} is number {number} whose loss or gradient is not finite (loss {self.loss})"
        raise ValueError(
            f"{which}: training has diverged; lower optimizer.base_lr (for fine-tuning, optimizer.lr), or look at the "
            f"samples whose keys and positions stand in {folder / name}; the checkpoints before it are sound"
        )

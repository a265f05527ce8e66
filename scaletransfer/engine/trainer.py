"""The training loop: load, step, log, validate, save. State: the engine, and the number of steps done."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from scaletransfer.cli import Stopped
from scaletransfer.engine import verify, watch
from scaletransfer.engine.build import Engine
from scaletransfer.engine.checkpoint_copy import set_generators
from scaletransfer.engine.checkpoint_saver import Away, Saver
from scaletransfer.engine.evaluate import by_source, curves, gather_rows, predict, report, score, titles_of
from scaletransfer.engine.guard import Guard
from scaletransfer.engine.nonfinite import Nonfinite
from scaletransfer.engine.pieces import updates_of
from scaletransfer.engine.reading import Reading
from scaletransfer.engine.runlog import RunLog, validated
from scaletransfer.engine.settings import Mixing, RunSettings
from scaletransfer.engine.step import StepResult, no_step, train_step
from scaletransfer.engine.stopping import Late
from scaletransfer.engine.telling import arithmetic, sample_keys, say_shares
from scaletransfer.loader import Batch, EvalSampler, ShardDataset, StepSampler
from scaletransfer.losses import Loss
from scaletransfer.streams import WorkerKind, batches, dead_workers_named, make_loader

ASK_EVERY = 8
"""Batches of a validation between two looks at whether a rank was asked to stop; the sum is read a look later."""


def shown_score(value: float | None) -> str:
    """A score as text."""
    return "none has both outcomes" if value is None else f"{value:.4f}"


class _Abandoned(Exception):
    """A validation was given up because a rank was asked to stop."""


@dataclass(kw_only=True)
class Trainer:
    """A run under one engine.

    Args:
        cfg, engine, loss, names: what is trained. names: of the outputs, in order.
        train: dataset with an order; valid: without, or None.
        normalize: uint8 batch -> float batch on the device.
        lr: samples seen -> learning rate. folder: of the run. facts: what every checkpoint's manifest says of the run.
        mixing: None for none. keep_best: whether the model with the best validation score so far is kept as well.
        start, total: steps done before, and in all. best: best validation score so far.
        generators: states of this rank's random generators to go on from, or None. away: copies checkpoints elsewhere.
        reading: counts what is read. worker_kind: of training batches, see ``streams.make_loader``.
        guard: around the run. skipped: steps that were left out so far, their loss or gradient not finite.
    """

    cfg: RunSettings
    engine: Engine
    loss: Loss
    names: tuple[str, ...]
    train: ShardDataset
    valid: ShardDataset | None
    normalize: Callable[[Tensor], Tensor]
    lr: Callable[[int], float]
    folder: Path
    facts: dict[str, Any]
    start: int
    total: int
    best: float | None = None
    mixing: Mixing | None = None
    keep_best: bool = True
    predicted: dict[str, np.ndarray] | None = None
    """Of the last validation."""
    held: IO[str] | None = None
    """Rank 0's claim on the run folder, kept open as long as the run lives."""
    generators: dict[str, bytes] | None = None
    away: Away | None = None
    reading: Reading = field(default_factory=Reading)
    worker_kind: WorkerKind = "auto"
    guard: Guard = field(default_factory=Guard)
    skipped: int = 0
    _pending: list[tuple[int, float, StepResult, Tensor]] = field(default_factory=list)
    _since: float = 0.0
    _saved_at: float = 0.0
    _saved_step: int | None = None

    def complete(self) -> bool:
        """Whether nothing is left to do. All ranks call this."""
        return self.start >= self.total and not self._owes_validation()

    def run(self) -> None:
        """Train from ``start`` to ``total``. All ranks call this.

        Raises:
            EngineMismatch: what runs is not what was asked for. ValueError: data that cannot be read, or a loss that
            is no longer finite; the checkpoints written before stay. Stopped: a rank was asked to stop; a checkpoint
            of the last step was written.
        """
        rank0 = self.engine.rank == 0
        owed = self._owes_validation()
        self.log = RunLog(self.folder, self.start, self.total, active=rank0, tensorboard=self.cfg.log.tensorboard)
        self.saver = Saver.of(self.engine, self.cfg.checkpoint, self.log, self.away, self._tick_saving)
        self._since = self._saved_at = time.monotonic()
        self.engine.model.train()
        self.guard.begin(self.folder)
        try:
            with dead_workers_named():
                if owed and not self._validate(self.start):
                    self._stop(self.start)
                self._loop()
            self.guard.tick(self.total, watch.SAVING)
            self.saver.wait()
            self.guard.end()
        finally:
            self.saver.close()
            self.log.close()

    def _loop(self) -> None:
        verified = False
        for step, group in enumerate(self._steps(), self.start + 1):
            if self.engine.rank == 0:
                say_shares(self.log, self.train, step, begins=step == self.start + 1)
            known = self._anything_known(step)
            first = self._first_step() if known and not verified else None
            result = self._step(step, group, first, known)
            self.saver.check()
            verified = verified or (known and not result.skipped)
            stop = result.asked.read() > 0
            if self._due(step, self.cfg.log.every_steps) or first is not None or result.skipped or stop:
                self.guard.tick(step, watch.LOGGING)
                self._flush()
            if first is not None and not result.skipped:
                rows = arithmetic(self.cfg.global_batch, self.engine, self.train)
                self.log.say(verify.table(self.engine, first, rows))
            if self._validation_due(step) and not stop:
                self._flush()
                stop = not self._validate(step)
            if stop:
                self.save_now(step)
                self._stop(step)
            if self._save_due(step):
                self._flush()
                self._save(step)

    def _stop(self, step: int) -> None:
        """End the run, all of it saved up to ``step``. All ranks call this."""
        why = self.guard.stopping.asked or "another rank was asked"
        self.log.say(f"stopped after step {step} ({why}): it is saved, the same command goes on from there")
        self.guard.end(stopped_after=step)
        self.engine.barrier()  # a launcher ends the others when the first has ended: not before the marker is there
        raise Stopped(f"after step {step} of {self.total}, which is saved; the same command goes on from there")

    def _steps(self) -> Iterator[list[Batch]]:
        """The micro-batches of this rank, step by step; the time spent waiting for them is counted."""
        batch = self.cfg.global_batch
        engine = self.engine
        sampler = StepSampler(
            self.start * batch, self.total * batch, engine.rank, engine.world, engine.micro_batch, batch
        )
        data = self.cfg.data
        stream = batches(make_loader(self.train, sampler, data.workers, self.worker_kind, data.prefetch_mb))
        with closing(stream):  # type: ignore[type-var]
            for step, _ in enumerate(sampler.steps, self.start + 1):
                self.guard.tick(step, watch.WAITING)
                began = time.monotonic()
                group = [next(stream) for _ in range(engine.accumulation)]
                self.reading.waited += time.monotonic() - began
                if self.generators is not None:  # only now: an iterator over batches draws from them when it is made
                    set_generators(self.generators, engine.device)
                    self.generators = None
                yield group

    def _first_step(self) -> verify.FirstStep:
        kept = 2 if isinstance(self.engine.optimizer, torch.optim.AdamW) else int(self.cfg.optimizer.momentum > 0)
        return verify.FirstStep(self.engine, momentum=kept)

    def _anything_known(self, step: int) -> bool:
        """Whether the global batch of a step has a known label; the same on every rank, without asking the others."""
        batch = self.cfg.global_batch
        positions = np.arange((step - 1) * batch, step * batch, dtype=np.int64)
        return self.loss.task != "multilabel" or not self.train.nothing_known(positions)

    def _step(self, step: int, group: list[Batch], first: verify.FirstStep | None, known: bool) -> StepResult:
        self.guard.tick(step, watch.TRAINING)
        stop, skip = bool(self.guard.stopping.asked), self.cfg.failing.skip_nonfinite > 0
        seen = (step - 1) * self.cfg.global_batch
        rate = self.lr(seen)
        after_backward = first.after_backward if first is not None else None
        normalize, batches_ = self.normalize, group
        if self.mixing is not None:
            mixing, update = self.mixing, step - 1
            batches_ = [{**batch, "target": mixing.targets(update, batch["target"])} for batch in group]

            def normalize(images: Tensor) -> Tensor:
                return mixing.images(update, self.normalize(images))

        if known:
            result = train_step(self.engine, self.loss, normalize, batches_, rate, after_backward, stop=stop, skip=skip)
        else:
            result = no_step(self.engine, stop)
        if self.engine.average is not None and known and not result.skipped:
            self.engine.average.update()
        if first is not None:
            first.discard() if result.skipped else first.after_step()
        for batch in group:
            self.reading.add(batch, alone=self.engine.world == 1)
        read = torch.stack([torch.cat([b["position"] for b in group]), torch.cat([b["key"] for b in group])], dim=1)
        self._pending.append((step, rate, result, read))
        return result

    def _flush(self) -> None:
        """Add the pending steps over the ranks and write them; the only place where the host waits for the device."""
        if not self._pending:
            return
        engine, pending = self.engine, self._pending
        self._pending = []
        losses = engine.sum_over_ranks(torch.stack([result.loss for _, _, result, _ in pending])).tolist()
        norms = torch.stack([r.square_norm for _, _, r, _ in pending]).sqrt().tolist()
        clipped = torch.stack([r.clipped.float() for _, _, r, _ in pending]).tolist()
        read = gather_rows(engine, torch.stack([keys for _, _, _, keys in pending]).unsqueeze(0))
        now = time.monotonic()
        seconds, self._since = max(1e-9, now - self._since), now
        row, scalars = self.reading.report(engine, seconds)
        for number, (step, rate, result, _) in enumerate(pending):
            values = (losses[number], norms[number], clipped[number])
            self._write(step, rate, *values, read[:, number].reshape(-1, 2), result.skipped)
        speed = len(pending) * self.cfg.global_batch / seconds
        step, loss = pending[-1][0], losses[-1]
        self.log.row({"event": "log", "step": step, "images_per_second": round(speed, 2), **row})
        curves = {
            "train/loss": loss,
            "train/lr": pending[-1][1],
            "train/grad_norm": norms[-1],
            "train/clipped_units": clipped[-1],
            "speed/images_per_second": speed,
            **scalars,
        }
        self.log.scalars(step, curves)
        text = f"loss {loss:.4f}, {speed:.0f} images/s, waiting {100 * row['data_wait']:.0f} %"
        self.log.advance(len(pending), text)
        self.log.note(f"step {step}/{self.total}: {text}, lr {pending[-1][1]:.3g}")
        self.log.flush()

    def _write(
        self, step: int, rate: float, loss: float, norm: float, clipped: float, read: Tensor, skipped: bool
    ) -> None:
        batch = self.cfg.global_batch
        verify.check_positions(read[:, 0], step - 1, batch)
        read = read[read[:, 0].argsort()]
        keys = sample_keys(self.train, read)
        if skipped or not (math.isfinite(loss) and math.isfinite(norm)):
            self.skipped += 1
            most = self.cfg.failing.skip_nonfinite
            batch_ = Nonfinite(step, loss, norm, keys, read[:, 0].tolist(), skipped)
            batch_.keep(self.folder, self.log, rank0=self.engine.rank == 0)
            batch_.judge(self.folder, self.log, self.skipped, most)
        if skipped:
            return
        row: dict[str, Any] = {
            "step": step,
            "samples": step * batch,
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
        }
        if clipped == clipped:
            row["clipped_units"] = clipped
        row["keys_sha256"] = hashlib.sha256("\n".join(keys).encode()).hexdigest()
        self.log.row(row)

    @staticmethod
    def _due(step: int, every: int | None) -> bool:
        return every is not None and step % every == 0

    def _validation_due(self, step: int) -> bool:
        if self.valid is None:
            return False
        assert self.train.order is not None
        epochs = self.cfg.validate.every_epochs
        by_epoch = None if epochs is None else epochs * self.train.order.steps_per_epoch
        return step == self.total or self._due(step, self.cfg.validate.every_steps) or self._due(step, by_epoch)

    def _owes_validation(self) -> bool:
        """Whether this run was stopped in the validation of the step that it starts from. Rank 0 knows, all hear it."""
        if self.start == 0 or not self._validation_due(self.start):
            return False
        owed = self.engine.rank == 0 and not validated(self.folder, self.start)
        return bool(self.engine.sum_over_ranks(torch.tensor(int(owed), device=self.engine.device)))

    def _validate(self, step: int) -> bool:
        """Validate; False where that was given up because a rank was asked to stop."""
        assert self.valid is not None
        began = time.monotonic()
        self.guard.tick(step, watch.VALIDATING)
        try:
            self.predicted = self.predict(step)
        except _Abandoned:
            self.engine.model.train()
            self.log.say(f"step {step}: its validation is given up, and done again when the run goes on")
            return False
        found = report(self.loss, self.predicted, self.names)
        which = self.valid.locate(self.predicted["position"])[0]
        titles = titles_of([source.index.source for source in self.valid.sources])
        if sources := by_source(self.loss, self.predicted, self.names, which, titles):
            found["sources"] = sources
        name, value = score(self.loss.task, found)
        self.log.scalars(step, curves(found, self.names))
        self.log.row({"event": "validation", "step": step, **found})
        self.log.flush()  # before a checkpoint says that this step is done: a resumed run does not validate it again
        shown = shown_score(value)
        self.log.say(f"step {step}: validation loss {found['loss']:.4f}, {name} {shown}")
        for title, one in found.get("sources", {}).items():
            self.log.say(f"  {title}: {one['samples']} images, loss {one['loss']:.4f}, {name} {shown_score(one[name])}")
        self._since += time.monotonic() - began  # images/s is that of training
        if self.keep_best and value is not None and (self.best is None or value > self.best):
            self.best = value
            facts = {**self._facts(step), "validation": {"loss": found["loss"], name: value}}
            self.saver.save(self.folder / "best", step, facts, keep=1, with_momentum=False)
        return True

    def validate(self) -> dict[str, Any]:
        """Loss and metrics on the validation split. All ranks call this."""
        self.predicted = self.predict()
        return report(self.loss, self.predicted, self.names)

    def predict(self, step: int | None = None) -> dict[str, np.ndarray]:
        """Logits and targets on the validation split: see ``evaluate.predict``. All ranks call this.

        step: of the run that may be asked to stop meanwhile; None: nothing interrupts it.
        """
        assert self.valid is not None
        engine = self.engine
        samples = min(len(self.valid), self.cfg.validate.max_samples or len(self.valid))
        sampler = EvalSampler(samples, engine.rank, engine.world, self.cfg.validate.batch or engine.micro_batch)
        data = self.cfg.data
        kind: WorkerKind = "processes" if self.worker_kind == "processes" else "auto"
        stream = batches(make_loader(self.valid, sampler, data.workers, kind, data.prefetch_mb))
        with closing(stream):  # type: ignore[type-var]
            return predict(engine, self.normalize, stream if step is None else self._unless_stopped(step, stream))

    def _unless_stopped(self, step: int, stream: Iterator[Batch]) -> Iterator[Batch]:
        before: Late | None = None
        for number, batch in enumerate(stream):
            self.guard.tick(step, watch.VALIDATING)
            if number % ASK_EVERY == 0:
                if before is not None and before.read():
                    raise _Abandoned
                asked = torch.full((), int(bool(self.guard.stopping.asked)), device=self.engine.device)
                before = Late(self.engine.sum_over_ranks(asked))
            yield batch

    def _save_due(self, step: int) -> bool:
        """The same answer on every rank. Minutes are rank 0's, and asked for where the host waits anyway."""
        settings = self.cfg.checkpoint
        due = step == self.total or self._due(step, settings.every_steps)
        if settings.every_minutes is not None and not due and self._due(step, self.cfg.log.every_steps):
            late = time.monotonic() - self._saved_at > 60 * settings.every_minutes
            flag = torch.tensor(int(late and self.engine.rank == 0), device=self.engine.device)
            due = bool(self.engine.sum_over_ranks(flag))
        return due

    def _tick_saving(self) -> None:
        self.guard.tick(self._saved_step or self.start, watch.SAVING)

    def _save(self, step: int) -> None:
        self.guard.tick(step, watch.SAVING)
        self.saver.save(self.folder / "checkpoints", step, self._facts(step), keep=self.cfg.checkpoint.keep)
        self._saved_at = time.monotonic()
        self._saved_step = step

    def save_now(self, step: int) -> None:
        """Save after ``step``, which must be the last one done, and wait until the checkpoint is complete. All ranks
        call this, between two steps.

        Raises:
            OSError, ValueError: it cannot be written, whatever ``checkpoint.on_failure`` says; those before it stay.
        """
        self._flush()
        if self._saved_step != step:
            self._save(step)
        self.saver.settle(strict=True)

    def _facts(self, step: int) -> dict[str, Any]:
        facts = {"samples_seen": step * self.cfg.global_batch, "best": self.best, "skipped": self.skipped}
        updates = updates_of(self.engine.optimizer)
        return {**self.facts, **facts, **({} if updates is None else {"updates": updates})}

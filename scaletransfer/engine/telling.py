"""What a run tells of its data: shares of its sources, keys of a batch, how a batch and an epoch are made up."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from scaletransfer.engine.build import Engine
from scaletransfer.engine.runlog import RunLog
from scaletransfer.loader import ShardDataset


def say_shares(log: RunLog, train: ShardDataset, step: int, *, begins: bool) -> None:
    """What share of an epoch's samples each source has: logged where an epoch begins, said where a run does.

    begins: ``step`` is the first one of this process.
    """
    order = train.order
    assert order is not None
    epoch, into = divmod(step - 1, order.steps_per_epoch)
    if len(order.sizes) == 1 or (into and not begins):
        return
    shares = order.shares(epoch)
    folders = [source.index.where for source in train.sources]
    if not into:
        log.row({"event": "epoch", "step": step, "epoch": epoch, "shares": shares, "folders": folders})
        log.scalars(step, {f"data/share_{place}": share for place, share in enumerate(shares)})
    if begins:
        text = ", ".join(f"{folder} {share:.2%}" for folder, share in zip(folders, shares, strict=True))
        log.say(f"samples of epoch {epoch}: {text}")


def arithmetic(global_batch: int, engine: Engine, train: ShardDataset) -> list[tuple[str, str]]:
    """Rows of the verification table: how ranks and micro-batches make a batch, and batches an epoch."""
    order = train.order
    assert order is not None
    parts = f"{engine.world} ranks x {engine.micro_batch} images x {engine.accumulation} micro-batches"
    epoch = f"{order.steps_per_epoch} steps of {sum(order.sizes)} samples in {len(order.sizes)} source(s)"
    return [("batch", f"{global_batch} = {parts}"), ("epoch", epoch)]


def sample_keys(train: ShardDataset, read: Tensor) -> list[str]:
    """Keys `<source>-<16 hex digits>` of the samples in rows of int64 [n, 2]: position, and what a batch calls key."""
    assert train.order is not None
    source, _ = train.order.locate(read[:, 0].numpy())
    words = read[:, 1].numpy().view(np.uint64)
    prefix = [chosen.index.source for chosen in train.sources]
    return [f"{prefix[s]}-{int(w):016x}" for s, w in zip(source, words, strict=True)]

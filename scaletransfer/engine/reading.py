"""What a run reads and waits for: bytes, cache, retries, samples that could not be used, of each rank."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from scaletransfer.engine.build import Engine
from scaletransfer.engine.evaluate import gather_rows
from scaletransfer.loader import Batch

TAGGED_RANKS = 64
"""Ranks up to which TensorBoard gets a curve of bytes for each; metrics.jsonl has them for any number."""
_BAD = 4  # after the four of a batch's "reads"


@dataclass(kw_only=True)
class Reading:
    """Sums since this process started. max_bad: samples, over all ranks, that may be unusable before the run stops; one
    that is met again in a later epoch is still one."""

    max_bad: int = 0
    bytes: int = 0
    waited: float = 0.0
    """Seconds that the loop waited for batches, since the last report."""
    _sums: np.ndarray = field(default_factory=lambda: np.zeros(4, dtype=np.int64))
    _before: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Bytes of each rank at the last report."""
    _bad: set[int] = field(default_factory=set)
    """Keys of the samples that could not be used: of this rank, and of all ranks up to the last report."""
    _new: list[int] = field(default_factory=list)
    """Those that this rank has met since."""

    def add(self, batch: Batch, *, alone: bool) -> None:
        """Count a batch. alone: this is the only rank, so that it may stop by itself; several stop in ``report``.

        Raises:
            ValueError: too many bad samples.
        """
        self.bytes += int(batch["bytes"])
        self._sums += batch["reads"].numpy()
        for key, sentence in zip(batch["bad_key"].tolist(), batch["bad"], strict=True):
            if key in self._bad:
                continue
            self._bad.add(key)
            self._new.append(key)
            print(f"bad sample, left out: {sentence}", file=sys.stderr, flush=True)
            if alone:
                self._check(f"the last: {sentence}")

    def _check(self, which: str) -> None:
        if len(self._bad) > self.max_bad:
            raise ValueError(
                f"{len(self._bad)} samples could not be used and data.max_bad_samples is {self.max_bad}; {which}"
            )

    def report(self, engine: Engine, seconds: float) -> tuple[dict[str, Any], dict[str, float | None]]:
        """What metrics.jsonl and TensorBoard get, over all ranks; all ranks call this. seconds: since the last report.

        Raises:
            ValueError: too many bad samples on all ranks together.
        """
        mine = torch.from_numpy(np.concatenate([[self.bytes], self._sums, [len(self._new)]]))
        ranks = gather_rows(engine, mine[None]).numpy()
        share = min(1.0, self.waited / seconds)
        waits = gather_rows(engine, torch.tensor([share])).tolist()
        self.waited = 0.0
        if not len(self._before):
            self._before = np.zeros(len(ranks), dtype=np.int64)
        self._share(engine, ranks[:, 1 + _BAD])
        bad = len(self._bad)
        self._check("they are named above")
        row: dict[str, Any] = {"data_wait": round(share, 4), "bytes_read": ranks[:, 0].tolist(), "bad_samples": bad}
        scalars: dict[str, float | None] = {
            "speed/data_wait": share,
            "speed/data_wait_largest": max(waits),
            "speed/bytes_per_second": float((ranks[:, 0] - self._before).sum() / seconds),
            "data/bad_samples": float(bad),
        }
        for rank in range(min(len(ranks), TAGGED_RANKS)):
            scalars[f"speed/bytes_per_second_rank_{rank}"] = float((ranks[rank, 0] - self._before[rank]) / seconds)
        self._before = ranks[:, 0]
        remote, hits, misses, retries = ranks[:, 1 : 1 + _BAD].sum(axis=0).tolist()
        if remote or hits or misses or retries:
            row |= {"remote_bytes": remote, "cache_hits": hits, "cache_misses": misses, "retries": retries}
            scalars |= {
                "data/remote_bytes": float(remote),
                "data/cache_hits": float(hits),
                "data/cache_hit_share": hits / max(1, hits + misses),
                "data/retries": float(retries),
            }
        return row, scalars

    def _share(self, engine: Engine, new: np.ndarray) -> None:
        """Every rank learns the keys of all; new: how many each rank has."""
        if new.any():
            mine = torch.zeros(1, int(new.max()), dtype=torch.int64)
            mine[0, : len(self._new)] = torch.tensor(self._new, dtype=torch.int64)
            for keys, count in zip(gather_rows(engine, mine).tolist(), new.tolist(), strict=True):
                self._bad.update(keys[:count])
            self._new.clear()

"""Which sample stands where: pure functions of (seed, epoch, step, rank, world), no I/O.

A *position* is the number of samples seen before this one, counted over the whole run and over all ranks. It is the
only state that the data side has: resuming, changing the number of ranks or of workers, and the randomness of
augmentation all start from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal, Protocol

import numpy as np

ORDER_VERSION = 1
"""Raised whenever the same arguments would give another sequence; stands in every checkpoint."""


def raw_words(seed: int, epoch: int, stream: int, count: int) -> np.ndarray:
    """uint64[count] of the Philox4x64-10 counter generator (Salmon et al. 2011, "Parallel random numbers").

    The raw words of a numpy bit generator are covered by numpy's compatibility promise, those of
    ``Generator.permutation`` are not: an order must be the same in five years.
    """
    key = blake2b(f"{seed}/{epoch}/{stream}".encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(key, dtype="<u8").copy()).random_raw(count)


def permutation(seed: int, epoch: int, stream: int, count: int) -> np.ndarray:
    """int64[count]: a permutation of range(count), by sorting random words (ties keep their order)."""
    return np.argsort(raw_words(seed, epoch, stream, count), kind="stable")


def sample_seed(seed: int, position: int) -> int:
    """A 63-bit seed for everything random that happens to the sample at this position."""
    digest = blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def rank_positions(step: int, rank: int, world: int, micro: int, global_batch: int) -> np.ndarray:
    """int64[accumulation, micro]: the positions that ``rank`` reads in ``step``.

    The global batch is cut into accumulation x world x micro consecutive pieces, so the set of positions of a step
    is always [step * global_batch, (step + 1) * global_batch).
    """
    accumulation = global_batch // (world * micro)
    assert accumulation * world * micro == global_batch, "the configuration checks this"
    base = step * global_batch
    rounds = np.arange(accumulation, dtype=np.int64)[:, None] * (world * micro)
    return base + rounds + rank * micro + np.arange(micro, dtype=np.int64)[None, :]


@dataclass(frozen=True)
class Order:
    """The order of samples over one or several indexes.

    Args:
        sizes: number of samples of each source.
        weights: one per source, or all ``None``. All ``None``: an epoch is a permutation of all samples, each at most
            once, the last incomplete global batch is left out. Otherwise an epoch is sum(sizes) draws: the source by
            weight, inside a source its own permutation, started again when it is used up.
        seed: of the run.
        global_batch: samples per optimizer step over all ranks.

    Raises:
        ValueError: fewer samples than one global batch, an empty source, or weights of which only some are given.
    """

    sizes: tuple[int, ...]
    weights: tuple[float | None, ...]
    seed: int
    global_batch: int
    _cache: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.weights) or not self.sizes:
            raise ValueError(f"{len(self.sizes)} sources but {len(self.weights)} weights: give one weight a source")
        if min(self.sizes) < 1:
            raise ValueError("a source has no samples: check the split's name and the shards' index.json")
        given = [w for w in self.weights if w is not None]
        if given and (len(given) != len(self.weights) or min(given) < 0 or sum(given) <= 0):
            raise ValueError(
                f"mixing weights {list(self.weights)}: give every source a weight of at least 0, or none a weight"
            )
        if self.steps_per_epoch < 1:
            raise ValueError(
                f"global_batch {self.global_batch} is larger than the {sum(self.sizes)} training samples: lower it"
            )

    @property
    def steps_per_epoch(self) -> int:
        return sum(self.sizes) // self.global_batch

    @property
    def samples_per_epoch(self) -> int:
        return self.steps_per_epoch * self.global_batch

    def locate(self, positions: np.ndarray | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Source number and row for each position: two int64 arrays of the shape of ``positions``."""
        where = np.asarray(positions, dtype=np.int64)
        source, row = np.empty_like(where), np.empty_like(where)
        epochs = where // self.samples_per_epoch
        for epoch in np.unique(epochs):
            mask = epochs == epoch
            sources, rows = self._epoch(int(epoch))
            inside = where[mask] - epoch * self.samples_per_epoch
            source[mask], row[mask] = sources[inside], rows[inside]
        return source, row

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        found = self._cache.get(epoch)
        if found is None:
            while len(self._cache) >= 2:  # a global batch never spans more than two epochs
                del self._cache[next(iter(self._cache))]
            found = self._cache[epoch] = self._make_epoch(epoch)
        return found

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        starts = np.concatenate([[0], np.cumsum(self.sizes)])
        if self.weights[0] is None:
            flat = permutation(self.seed, epoch, 0, int(starts[-1]))[: self.samples_per_epoch]
            source = np.searchsorted(starts, flat, side="right") - 1
            return source, flat - starts[source]
        weights = np.array([w or 0.0 for w in self.weights])
        uniform = (raw_words(self.seed, epoch, 0, self.samples_per_epoch) >> np.uint64(11)) * 2.0**-53
        edges = np.cumsum(weights / weights.sum())
        source = np.minimum(np.searchsorted(edges, uniform, side="right"), int(np.flatnonzero(weights)[-1]))
        row = np.empty(self.samples_per_epoch, dtype=np.int64)
        for number, size in enumerate(self.sizes):
            mine = source == number
            draws = int(mine.sum())
            cycles = [
                permutation(self.seed, epoch, 1 + number + k * len(self.sizes), size) for k in range(-(-draws // size))
            ]
            row[mine] = np.concatenate([*cycles, np.empty(0, dtype=np.int64)])[:draws]
        return source.astype(np.int64), row


class Positions(Protocol):
    """What the loader and the training loop need of an order: ``Order`` and ``SelectionOrder`` are such."""

    @property
    def sizes(self) -> tuple[int, ...]: ...
    @property
    def samples_per_epoch(self) -> int: ...
    @property
    def steps_per_epoch(self) -> int: ...
    def locate(self, positions: np.ndarray | Sequence[int]) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class SelectionOrder:
    """The endless order over chosen rows of one source, which may be fewer than a global batch (fine-tuning).

    Args:
        rows: int64 [N], the chosen rows of the sample table, N >= 1.
        seed: of the run. global_batch: samples a step, for ``steps_per_epoch`` alone.
        draw: "permutation": one permutation of all rows after the other, nothing left out, so that after k N samples
            every row was seen k times. "replacement": independent draws.
        weights: float [N], "replacement" only: a row is drawn in proportion; None: all alike.

    Raises:
        ValueError: no rows, or weights that are not positive and finite.
    """

    rows: np.ndarray
    seed: int
    global_batch: int
    draw: Literal["permutation", "replacement"] = "permutation"
    weights: np.ndarray | None = None
    _cache: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.rows) == 0:
            raise ValueError("no training sample is selected: choose other classes or more examples")
        if self.weights is not None:
            assert self.draw == "replacement" and self.weights.shape == self.rows.shape
            if not (np.isfinite(self.weights).all() and (self.weights > 0).all()):
                raise ValueError("sampling weights must be positive and finite")

    @property
    def sizes(self) -> tuple[int, ...]:
        return (len(self.rows),)

    @property
    def samples_per_epoch(self) -> int:
        return len(self.rows)

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.rows) // self.global_batch)

    def locate(self, positions: np.ndarray | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Source number (always 0) and table row of each position: two int64 arrays of its shape."""
        where = np.asarray(positions, dtype=np.int64)
        row = np.empty_like(where)
        cycles = where // len(self.rows)
        for cycle in np.unique(cycles):
            mask = cycles == cycle
            row[mask] = self._cycle(int(cycle))[where[mask] - cycle * len(self.rows)]
        return np.zeros_like(where), row

    def _cycle(self, cycle: int) -> np.ndarray:
        """Table rows of the positions [cycle * N, (cycle + 1) * N)."""
        found = self._cache.get(cycle)
        if found is None:
            while len(self._cache) >= 2:
                del self._cache[next(iter(self._cache))]
            count = len(self.rows)
            if self.draw == "permutation":
                chosen = permutation(self.seed, cycle, 0, count)
            else:
                uniform = (raw_words(self.seed, cycle, 1, count) >> np.uint64(11)) * 2.0**-53
                weights = np.ones(count) if self.weights is None else self.weights
                chosen = np.minimum(np.searchsorted(np.cumsum(weights / weights.sum()), uniform, "right"), count - 1)
            found = self._cache[cycle] = self.rows[chosen]
        return found

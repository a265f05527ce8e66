"""Which sample stands where: pure functions of (seed, epoch, step, rank, world), no I/O.

A *position* is the number of samples seen before this one, counted over the whole run and over all ranks. It is the
only state that the data side has: resuming, changing the number of ranks or of workers, and the randomness of
augmentation all start from it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from struct import Struct
from typing import Literal, Protocol

import numpy as np

ORDER_VERSION = 2
"""Raised whenever the same arguments would give another sequence; stands in every checkpoint."""

WINDOW = 1024
"""Consecutive samples that are shuffled among themselves: what lies between them in a shard is read together."""


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


def sample_uniforms(seed: int, position: int, count: int = 32) -> list[float]:
    """The first ``count`` (at most 32) of the numbers in [0, 1) for everything random that happens to the sample at
    this position, multiples of 2^-32."""
    name = f"{seed}:{position}".encode()
    words = _WORDS.unpack(blake2b(name, digest_size=64, salt=b"0").digest())
    if count > len(words):
        words += _WORDS.unpack(blake2b(name, digest_size=64, salt=b"1").digest())
    return [word * 2.0**-32 for word in words[:count]]


_WORDS = Struct("<16I")


def rank_positions(step: int, rank: int, world: int, micro: int, global_batch: int) -> np.ndarray:
    """int64[accumulation, micro]: the positions that ``rank`` reads in ``step``.

    A rank has the same consecutive places in every global batch, and with them the same stretches of the epoch (see
    ``Order``). The set of positions of a step is always [step * global_batch, (step + 1) * global_batch).
    """
    accumulation = global_batch // (world * micro)
    assert accumulation * world * micro == global_batch, "the configuration checks this"
    first = step * global_batch + rank * accumulation * micro
    return first + np.arange(accumulation * micro, dtype=np.int64).reshape(accumulation, micro)


class _Stream:
    """A shuffle of the samples of some shards that is evaluated where it is asked: number in the stream -> number of
    the sample, both counted over all shards.

    The shards stand in a random order, the samples of each in their own; the beginning is a random sample; then each
    WINDOW of consecutive samples is shuffled. Nothing of the size of the epoch is ever made: start and resume cost as
    much as there are shards.
    """

    def __init__(self, shards: np.ndarray, seed: int, epoch: int, stream: int, windows: int) -> None:
        self._name = (seed, epoch, stream)
        order = permutation(seed, epoch, _name_of(stream, 0), len(shards))
        self._first = (np.cumsum(shards) - shards)[order]
        self._edges = np.concatenate([[0], np.cumsum(shards[order])])
        self._count = int(self._edges[-1])
        self._turn = int(raw_words(seed, epoch, _name_of(stream, 1), 1)[0] % np.uint64(self._count))
        self._windows: OrderedDict[int, np.ndarray] = OrderedDict()
        self._most = windows

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """int64 [n] -> int64 [n]; n may be 0."""
        window, inside = np.divmod(numbers, WINDOW)
        distinct, which = np.unique(window, return_inverse=True)
        shuffles = [self._window(number) for number in distinct.tolist()]
        if len(shuffles) == 1:
            moved = shuffles[0][inside]
        elif not shuffles:
            return numbers
        else:
            moved = np.empty_like(numbers)
            members = np.argsort(which, kind="stable")
            for shuffle, chosen in zip(shuffles, np.split(members, np.cumsum(np.bincount(which))[:-1]), strict=True):
                moved[chosen] = shuffle[inside[chosen]]
        turned = (window * WINDOW + moved + self._turn) % self._count
        shard = np.searchsorted(self._edges, turned, side="right") - 1
        return self._first[shard] + turned - self._edges[shard]

    def _window(self, number: int) -> np.ndarray:
        found = self._windows.pop(number, None)
        if found is None:
            seed, epoch, stream = self._name
            samples = min(WINDOW, self._count - number * WINDOW)
            found = permutation(seed, epoch, _name_of(stream, 2 + number), samples).astype(np.int16)
        self._windows[number] = found
        while len(self._windows) > self._most:
            self._windows.popitem(last=False)
        return found


def _name_of(stream: int, number: int) -> int:
    """One name for number `number` of a stream: no two pairs below 2^64 share one."""
    return (stream << 64) + number


class _Epoch(Protocol):
    def __call__(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class Order:
    """The order of samples over one or several indexes.

    Each place of the global batch walks a stretch of its own through the epoch, in which shards lie one behind the
    other (``_Stream``): place p sees, step after step, the samples [p * steps, (p + 1) * steps). So a batch is drawn
    from all over the epoch, while a rank, which has the same places in every batch, reads 1/ranks of the shards, each
    from its beginning to its end but for the shuffled windows.

    Args:
        shards: of each source, the number of samples of each shard, in the order of its sample table.
        weights: one per source, or all ``None``. All ``None``: an epoch is a permutation of all samples, each at most
            once, the last incomplete global batch is left out. Otherwise an epoch is as many draws: the source by
            weight, inside a source its own permutation, started again when it is used up.
        seed: of the run.
        global_batch: samples per optimizer step over all ranks.

    Raises:
        ValueError: fewer samples than one global batch, an empty source, or weights of which only some are given.
    """

    shards: tuple[tuple[int, ...], ...]
    weights: tuple[float | None, ...]
    seed: int
    global_batch: int
    _cache: dict[int, _Epoch] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.shards) != len(self.weights) or not self.shards:
            raise ValueError(f"{len(self.shards)} sources but {len(self.weights)} weights: give one weight a source")
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

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each source."""
        return tuple(sum(shards) for shards in self.shards)

    @cached_property
    def steps_per_epoch(self) -> int:
        return sum(self.sizes) // self.global_batch

    @property
    def samples_per_epoch(self) -> int:
        return self.steps_per_epoch * self.global_batch

    def locate(self, positions: np.ndarray | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Source number and row for each position: two int64 arrays of the shape of ``positions``."""
        where = np.asarray(positions, dtype=np.int64)
        source, row = np.empty_like(where), np.empty_like(where)
        epochs, inside = np.divmod(where, self.samples_per_epoch)
        step, place = np.divmod(inside, self.global_batch)
        numbers = place * self.steps_per_epoch + step
        if where.ndim == 1 and len(where) and (epochs == epochs[0]).all():  # nearly always, and once a batch
            return self._epoch(int(epochs[0]))(numbers)
        for epoch in np.unique(epochs):
            mask = epochs == epoch
            source[mask], row[mask] = self._epoch(int(epoch))(numbers[mask])
        return source, row

    def shares(self, epoch: int) -> list[float]:
        """What share of an epoch's samples each source has."""
        if self.weights[0] is None and len(self.sizes) > 1:
            left = np.arange(self.samples_per_epoch, sum(self.sizes))
            counts = np.array(self.sizes) - np.bincount(self._epoch(epoch)(left)[0], minlength=len(self.sizes))
        else:
            counts = np.bincount(self._draw(epoch), minlength=len(self.sizes))
        return (counts / self.samples_per_epoch).tolist()

    def _epoch(self, epoch: int) -> _Epoch:
        found = self._cache.get(epoch)
        if found is None:
            while len(self._cache) >= 2:  # a global batch never spans more than two epochs
                self._cache.pop(next(iter(self._cache)), None)
            made = self._permuted(epoch) if self.weights[0] is None else self._drawn(epoch)
            found = self._cache[epoch] = made
        return found

    @property
    def _windows(self) -> int:
        """Windows that are kept: one of each place, and the next."""
        return 2 * self.global_batch + 64

    def _permuted(self, epoch: int) -> _Epoch:
        starts = np.concatenate([[0], np.cumsum(self.sizes)])
        stream = _Stream(np.concatenate([np.array(s) for s in self.shards]), self.seed, epoch, 0, self._windows)

        def locate(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            flat = stream(numbers)
            if len(starts) == 2:
                return np.zeros_like(flat), flat
            source = np.searchsorted(starts, flat, side="right") - 1
            return source, flat - starts[source]

        return locate

    def _draw(self, epoch: int) -> np.ndarray:
        """The source of each number of the epoch."""
        weights = np.array([1.0 if w is None else w for w in self.weights])
        uniform = (raw_words(self.seed, epoch, 0, self.samples_per_epoch) >> np.uint64(11)) * 2.0**-53
        edges = np.cumsum(weights / weights.sum())
        return np.minimum(np.searchsorted(edges, uniform, side="right"), int(np.flatnonzero(weights)[-1]))

    def _drawn(self, epoch: int) -> _Epoch:
        source = self._draw(epoch).astype(np.int32)
        nth = np.empty(len(source), dtype=np.int64)  # the how-manieth draw of its source
        for number in range(len(self.sizes)):
            mine = np.flatnonzero(source == number)
            nth[mine] = np.arange(len(mine))
        streams: OrderedDict[tuple[int, int], _Stream] = OrderedDict()

        def stream(number: int, cycle: int) -> _Stream:
            key = (number, cycle)
            found = streams.pop(key, None)
            if found is None:
                name = 1 + number + cycle * len(self.sizes)
                found = _Stream(np.array(self.shards[number]), self.seed, epoch, name, self._windows)
            streams[key] = found
            if len(streams) > self._windows:
                streams.popitem(last=False)
            return found

        def locate(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            chosen = source[numbers].astype(np.int64)
            row = np.empty(len(numbers), dtype=np.int64)
            cycle, inside = np.divmod(nth[numbers], np.array(self.sizes)[chosen])
            for pair in np.unique(np.stack([chosen, cycle]), axis=1).T.tolist():
                mask = (chosen == pair[0]) & (cycle == pair[1])
                row[mask] = stream(*pair)(inside[mask])
            return chosen, row

        return locate


class Positions(Protocol):
    """What the loader and the training loop need of an order: ``Order`` and ``SelectionOrder`` are such."""

    @property
    def sizes(self) -> tuple[int, ...]: ...
    @property
    def samples_per_epoch(self) -> int: ...
    @property
    def steps_per_epoch(self) -> int: ...
    def shares(self, epoch: int) -> list[float]: ...
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

    def shares(self, epoch: int) -> list[float]:
        """There is one source."""
        return [1.0]

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

"""The order of samples: a permutation or weighted draws, the same whatever the number of ranks and workers."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaletransfer.order import (
    ORDER_VERSION,
    Order,
    SelectionOrder,
    permutation,
    rank_positions,
    raw_words,
    sample_seed,
)

SEEDS = st.integers(0, 2**63 - 1)


def epoch_of(order: Order, epoch: int) -> list[tuple[int, int]]:
    """(source, row) of every position of an epoch."""
    first = epoch * order.samples_per_epoch
    source, row = order.locate(np.arange(first, first + order.samples_per_epoch))
    return list(zip(source.tolist(), row.tolist(), strict=True))


def cut(size: int) -> tuple[int, ...]:
    """Uneven shards of `size` samples in all."""
    found: list[int] = []
    while size > sum(found):
        found.append(min(3 + 7 * len(found) % 11, size - sum(found)))
    return tuple(found)


def plain(*sizes: int, batch: int = 4, seed: int = 0) -> Order:
    return Order(shards=tuple(map(cut, sizes)), weights=(None,) * len(sizes), seed=seed, global_batch=batch)


def weighted(sizes: tuple[int, ...], weights: tuple[float, ...], batch: int = 4, seed: int = 0) -> Order:
    return Order(shards=tuple(map(cut, sizes)), weights=weights, seed=seed, global_batch=batch)


# ---- without weights


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 30), SEEDS, st.integers(0, 5))
def test_an_epoch_has_every_sample_once_but_for_the_last_incomplete_batch(sizes, batch, seed, epoch):
    if sum(sizes) < batch:
        return
    order = plain(*sizes, batch=batch, seed=seed)
    drawn = epoch_of(order, epoch)
    assert len(drawn) == len(set(drawn)) == sum(sizes) // batch * batch
    assert set(drawn) <= {(source, row) for source, size in enumerate(sizes) for row in range(size)}


def test_epochs_and_seeds_differ_and_the_samples_left_out_change():
    order = plain(100, 27, batch=8)
    epochs = [epoch_of(order, number) for number in range(6)]
    assert len({tuple(epoch) for epoch in epochs}) == 6
    left = [{(s, r) for s, n in enumerate((100, 27)) for r in range(n)} - set(epoch) for epoch in epochs]
    assert all(len(rest) == 7 for rest in left) and len(set(map(frozenset, left))) > 1
    assert epoch_of(plain(100, 27, batch=8, seed=1), 0) != epochs[0]


@given(st.integers(0, 300), SEEDS, st.integers(0, 3), st.integers(0, 3))
def test_permutation_is_one(count, seed, epoch, stream):
    assert sorted(permutation(seed, epoch, stream, count).tolist()) == list(range(count))


def test_every_place_of_a_permutation_is_equally_likely():
    # 2,000 permutations of 8: each value is expected 250 times at each place; 6 standard deviations are 89
    drawn = np.stack([permutation(seed, 0, 0, 8) for seed in range(2000)])
    counts = np.stack([np.bincount(drawn[:, place], minlength=8) for place in range(8)])
    assert np.abs(counts - 250).max() < 89


# ---- independence of ranks, micro-batches, accumulation


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 5), st.integers(0, 1000))
def test_the_ranks_partition_every_step(world, micro, accumulation, step):
    batch = world * micro * accumulation
    shares = [rank_positions(step, rank, world, micro, batch) for rank in range(world)]
    assert all(share.shape == (accumulation, micro) and share.dtype == np.int64 for share in shares)
    together = np.concatenate([share.ravel() for share in shares])
    assert sorted(together.tolist()) == list(range(step * batch, (step + 1) * batch))


def test_the_global_batch_is_the_same_for_every_split_over_ranks():
    order = plain(200, batch=24)
    found = set()
    for world, micro in [(1, 24), (1, 3), (2, 4), (3, 8), (4, 1), (24, 1), (2, 12)]:
        steps = []
        for step in range(12):
            shares = [rank_positions(step, rank, world, micro, 24).ravel() for rank in range(world)]
            source, row = order.locate(np.sort(np.concatenate(shares)))
            steps.append((source.tobytes(), row.tobytes()))
        found.add(tuple(steps))
    assert len(found) == 1


def test_any_question_in_any_order_gets_the_same_answer():
    """A position's sample depends on nothing that was asked before: the cache of epochs hides nothing."""
    once = plain(37, batch=5)
    expected = [epoch_of(plain(37, batch=5), number) for number in range(8)]
    for number in (7, 0, 3, 3, 6, 1, 0, 5, 2, 4):
        assert epoch_of(once, number) == expected[number]
    across = np.array([[34, 35], [36, 0]])  # 35 samples an epoch: two epochs in one question, any shape
    source, row = once.locate(across)
    assert source.shape == row.shape == (2, 2)
    assert row.tolist() == [[expected[0][34][1], expected[1][0][1]], [expected[1][1][1], expected[0][0][1]]]


def test_a_position_has_its_own_seed():
    seeds = {sample_seed(seed, position) for seed in range(4) for position in range(5000)}
    assert len(seeds) == 20_000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(11, 1) != sample_seed(1, 11)


def test_shares_are_those_of_the_samples_that_an_epoch_has():
    for batch in (1, 4, 5, 9, 20):  # of 20 samples: with and without some left over
        order = Order(shards=((3, 4), (1,), (12,)), weights=(None,) * 3, seed=1, global_batch=batch)
        for epoch in range(3):
            counts = Counter(source for source, _ in epoch_of(order, epoch))
            assert order.shares(epoch) == [counts[number] / order.samples_per_epoch for number in range(3)]


# ---- weights


def test_weights_give_the_sources_their_shares():
    order = weighted((1000, 3000, 500), (3.0, 1.0, 4.0), batch=10)
    counts = Counter(source for source, _ in epoch_of(order, 0))
    assert sum(counts.values()) == 4500
    for source, weight in enumerate((3, 1, 4)):
        share = weight / 8
        deviation = (4500 * share * (1 - share)) ** 0.5
        assert abs(counts[source] - 4500 * share) < 5 * deviation


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 10)), min_size=1, max_size=4),
    st.integers(1, 12),
    SEEDS,
    st.integers(0, 3),
)
def test_inside_a_source_draws_go_round_without_replacement(sources, batch, seed, epoch):
    sizes, weights = (tuple(column) for column in zip(*sources, strict=True))
    if sum(sizes) < batch:
        return
    drawn = epoch_of(weighted(sizes, weights, batch, seed), epoch)
    assert drawn == epoch_of(weighted(sizes, weights, batch, seed), epoch)
    assert len(drawn) == sum(sizes) // batch * batch
    for source, size in enumerate(sizes):
        times = np.bincount([row for s, row in drawn if s == source], minlength=size)
        assert len(times) == size and times.max() - times.min() <= 1


def test_the_cycles_of_a_source_are_shuffled_anew():
    """One place of the batch walks the epoch from end to end, so its draws stand in the order of the cycles."""
    rows = [row for source, row in epoch_of(weighted((20, 400), (9.0, 1.0), batch=1), 0) if source == 0]
    cycles = [tuple(rows[start : start + 20]) for start in range(0, len(rows) - 20, 20)]
    assert len(cycles) > 10 and len(set(cycles)) == len(cycles)


@given(st.integers(0, 2), SEEDS)
def test_a_source_of_weight_zero_is_never_drawn(idle, seed):
    weights = tuple(0.0 if source == idle else 1.0 for source in range(3))
    for epoch in range(2):
        assert idle not in {source for source, _ in epoch_of(weighted((50, 60, 70), weights, 10, seed), epoch)}


def test_the_scale_of_weights_does_not_matter():
    assert epoch_of(weighted((30, 50), (1.0, 3.0)), 2) == epoch_of(weighted((30, 50), (0.25, 0.75)), 2)


# ---- what is fixed for good


FROZEN = {
    "words": "8e498cb55a5a7e33fffaefa98d0b0d0f471e9b52c8b5609f0b33404ba7022986",
    "permutation": "2f33cfd672caec4228f3be531976310dc7e048912ef125b4aec67307a1a49b7e",
    "plain": "d21a13114989bd6210cd9b2ead965f4c24bad013ee6c240e4ce55a24a1b625f3",
    "weighted": "4dc82f63336c650a368d4fce753aeb329f9edd20f254be42a50777fd43c4b82c",
    "sample_seed": "4238add8930ad1cc3707004acbb7b116c7d0c6358d90d3d28ec98659784d5044",
}


def checksums() -> dict[str, str]:
    def digest(*arrays) -> str:
        return hashlib.sha256(b"".join(np.ascontiguousarray(a).astype("<i8").tobytes() for a in arrays)).hexdigest()

    several = plain(1000, 77, 3, batch=16, seed=5)
    drawn = weighted((1000, 77, 3), (1.0, 2.5, 0.5), batch=16, seed=5)
    positions = np.arange(3 * several.samples_per_epoch)
    return {
        "words": digest(raw_words(7, 3, 2, 100).view(np.int64)),
        "permutation": digest(permutation(7, 3, 2, 1000)),
        "plain": digest(*several.locate(positions)),
        "weighted": digest(*drawn.locate(positions)),
        "sample_seed": digest(np.array([sample_seed(5, position) for position in range(200)])),
    }


def test_order_version_2_gives_the_sequences_that_it_always_gave():
    """If this fails, a run that is resumed would see other samples: raise ORDER_VERSION, then renew the sums."""
    assert ORDER_VERSION == 2
    assert checksums() == FROZEN


# ---- errors


@pytest.mark.parametrize(
    ("sizes", "weights", "batch", "words"),
    [
        ((), (), 4, "0 sources"),
        ((10, 10), (1.0,), 4, "2 sources but 1 weights"),
        ((10, 0), (None, None), 4, "no samples"),
        ((10, 10), (1.0, None), 4, "every source a weight"),
        ((10, 10), (1.0, -0.5), 4, "every source a weight"),
        ((10, 10), (0.0, 0.0), 4, "every source a weight"),
        ((2, 1), (None, None), 4, "global_batch 4 is larger than the 3 training samples"),
    ],
)
def test_what_is_refused(sizes, weights, batch, words):
    with pytest.raises(ValueError, match=words) as caught:
        Order(shards=tuple(map(cut, sizes)), weights=weights, seed=0, global_batch=batch)
    assert "\n" not in str(caught.value)


def test_a_batch_that_does_not_divide_is_our_own_mistake():
    with pytest.raises(AssertionError):
        rank_positions(0, 0, 2, 3, 16)


# ---- of a selection (fine-tuning)


def selection(count: int, seed: int = 0, batch: int = 4, **options) -> SelectionOrder:
    return SelectionOrder(rows=np.arange(count) * 10 + 3, seed=seed, global_batch=batch, **options)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), SEEDS, st.integers(0, 400), st.integers(1, 120))
def test_a_selection_comes_round_evenly_from_any_position(count, seed, first, length):
    order = selection(count, seed)
    source, rows = order.locate(np.arange(first, first + length))
    assert not source.any() and set(rows.tolist()) <= set(order.rows.tolist())
    whole = order.locate(np.arange(first + length))[1]
    assert rows.tolist() == whole[first:].tolist()
    seen = Counter(whole.tolist())
    assert max(seen.values()) - min(seen.get(row, 0) for row in order.rows.tolist()) <= 1


def test_draws_with_replacement_follow_their_weights():
    plain_draws = selection(5, draw="replacement").locate(np.arange(50_000))[1]
    shares = np.bincount((plain_draws - 3) // 10, minlength=5) / 50_000
    assert np.abs(shares - 0.2).max() < 0.01
    weights = np.array([1.0, 1.0, 2.0, 4.0, 8.0])
    heavy = selection(5, draw="replacement", weights=weights).locate(np.arange(50_000))[1]
    shares = np.bincount((heavy - 3) // 10, minlength=5) / 50_000
    assert np.abs(shares - weights / 16).max() < 0.01
    first = selection(5, draw="replacement").locate(np.arange(5))[1]
    assert len({tuple(selection(5, seed, draw="replacement").locate(np.arange(5))[1]) for seed in range(20)}) > 10
    assert first.tolist() == plain_draws[:5].tolist()


def test_a_selection_of_nothing_and_bad_weights():
    with pytest.raises(ValueError, match="no training sample"):
        selection(0)
    with pytest.raises(ValueError, match="positive"):
        selection(2, draw="replacement", weights=np.array([1.0, 0.0]))
    assert selection(3, batch=8).steps_per_epoch == 1 and selection(30, batch=8).steps_per_epoch == 3

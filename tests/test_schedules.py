"""Learning rates against tables made by hand, and what must hold for every schedule."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaletransfer.schedules import Schedule, lr_at, peak_lr

# chexpert_bit152x4 on 64 GPUs of 16 images: peak 0.01 * 1024 / 256 = 0.04, warm-up from 0.04 / 64.
PAPER = Schedule(kind="step", base_lr=0.01, epochs=90, warmup_epochs=15, warmup_start_factor=1 / 64)
BATCH, EPOCH = 1024, 186 * 1024


def _at(schedule: Schedule, epoch: int, batch: int) -> float:
    return lr_at(schedule, (epoch * 186 + batch) * BATCH, EPOCH, BATCH)


def test_step_table_of_the_paper() -> None:
    assert peak_lr(PAPER, BATCH) == 0.04
    for epoch, batch, expected in [
        (0, 0, 0.04 / 64 * (1 / 186 * 63 / 15 + 1)),
        (0, 185, 0.04 / 64 * (63 / 15 + 1)),
        (7, 92, 0.04 / 64 * (7.5 * 63 / 15 + 1)),
        (14, 185, 0.04),
        (15, 0, 0.04),
        (29, 185, 0.04),
        (30, 0, 0.004),
        (59, 185, 0.004),
        (60, 0, 0.0004),
        (79, 185, 0.0004),
        (80, 0, 0.00004),
        (89, 185, 0.00004),
    ]:
        assert math.isclose(_at(PAPER, epoch, batch), expected, rel_tol=1e-12), (epoch, batch)


def test_one_gpu_of_the_paper_has_no_warm_up() -> None:
    schedule = dataclasses.replace(PAPER, warmup_start_factor=1.0)
    assert {_at(schedule, 0, 0), _at(schedule, 3, 100), _at(schedule, 20, 0)} == {0.04}


def test_warm_up_from_zero() -> None:
    schedule = Schedule(kind="step", base_lr=0.1, epochs=4, warmup_epochs=2)
    table = [lr_at(schedule, seen, 4 * 256, 256) for seen in range(0, 12 * 256, 256)]
    expected = [0.1 * k / 8 for k in range(1, 9)] + [0.1] * 4
    assert all(math.isclose(a, b, rel_tol=1e-12) for a, b in zip(table, expected, strict=True))


def test_cosine_table() -> None:
    schedule = Schedule(
        kind="cosine", base_lr=0.03, epochs=90, warmup_epochs=15, warmup_start_factor=0.25, min_lr=0.002
    )
    peak = 0.12
    for epoch, batch, expected in [
        (0, 185, peak * (0.25 + 0.75 / 15)),
        (14, 185, peak),
        (15, 185, 0.002 + (peak - 0.002) * (1 + math.cos(math.pi / 75)) / 2),
        (39, 185, 0.002 + (peak - 0.002) * 0.75),  # a third of the way: (1 + cos 60 degrees) / 2
        (52, 92, 0.002 + (peak - 0.002) * 0.5),  # halfway
        (64, 185, 0.002 + (peak - 0.002) * 0.25),
        (89, 185, 0.002),
        (95, 3, 0.002),
    ]:
        assert math.isclose(_at(schedule, epoch, batch), expected, rel_tol=1e-12), (epoch, batch)
    no_floor = dataclasses.replace(schedule, min_lr=0.0)
    assert _at(no_floor, 89, 185) == 0.0


def test_without_warm_up_and_with_nothing_but_warm_up() -> None:
    cosine = Schedule(kind="cosine", base_lr=1.0, epochs=1)
    table = [lr_at(cosine, seen, 4 * 256, 256) for seen in range(0, 4 * 256, 256)]
    assert all(math.isclose(a, (1 + math.cos(math.pi * k / 4)) / 2, abs_tol=1e-15) for k, a in enumerate(table, 1))
    only = dataclasses.replace(cosine, warmup_epochs=1)
    assert [lr_at(only, seen, 512, 256) for seen in (0, 256)] == [0.5, 1.0]
    assert lr_at(only, 512, 512, 256) == 0.0


def test_fractional_epochs() -> None:
    schedule = Schedule(
        kind="step", base_lr=1.0, epochs=2, warmup_epochs=0.5, decay_epochs=(0.75, 1.5), decay_factor=0.5
    )
    assert [lr_at(schedule, 256 * k, 1024, 256) for k in range(8)] == [0.5, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]


@st.composite
def _cases(draw: st.DrawFn) -> tuple[Schedule, int, int]:
    warmup = draw(st.sampled_from([0, 0.5, 1, 2, 5]))
    schedule = Schedule(
        kind=draw(st.sampled_from(["step", "cosine"])),
        base_lr=draw(st.floats(1e-4, 1.0)),
        epochs=warmup + draw(st.sampled_from([0.5, 1, 3, 10])),
        warmup_epochs=warmup,
        warmup_start_factor=draw(st.floats(0, 1)),
        decay_epochs=draw(st.sampled_from([(), (5,), (6, 7, 9)])),
    )
    return schedule, draw(st.integers(1, 2048)), draw(st.integers(1, 7))


@settings(deadline=None, max_examples=100)
@given(_cases())
def test_every_schedule_rises_then_falls_within_its_bounds(case: tuple[Schedule, int, int]) -> None:
    schedule, batch, batches = case
    peak = peak_lr(schedule, batch)
    steps = math.ceil(schedule.epochs * batches) + 2
    rates = [lr_at(schedule, step * batch, batches * batch, batch) for step in range(steps)]
    # Pure: any order of asking, any number of times, gives the same.
    again = [lr_at(schedule, step * batch, batches * batch, batch) for step in reversed(range(steps))]
    assert rates == again[::-1]
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)
    warm = sum(step < schedule.warmup_epochs * batches for step in range(steps))
    slack = peak * 1e-12
    assert all(a <= b + slack for a, b in pairwise(rates[:warm]))
    assert all(a >= b - slack for a, b in pairwise(rates[warm:]))
    if warm:
        assert rates[0] >= peak * schedule.warmup_start_factor - slack
        assert math.isclose(rates[warm - 1], peak, rel_tol=1e-12)


@settings(deadline=None, max_examples=50)
@given(_cases())
def test_the_peak_alone_depends_on_the_batch(case: tuple[Schedule, int, int]) -> None:
    """At the same fraction of an epoch, the rate is proportional to the global batch."""
    schedule, batch, batches = case
    for step in range(batches * 3):
        small = lr_at(schedule, step * batch, batches * batch, batch)
        large = lr_at(schedule, step * batch * 4, batches * batch * 4, batch * 4)
        assert math.isclose(large, 4 * small, rel_tol=1e-12, abs_tol=1e-300)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "linear"}, "kind must be one of step, cosine"),
        ({"base_lr": 0.0}, "base_lr must be a number above 0"),
        ({"base_lr": float("nan")}, "base_lr"),
        ({"epochs": -1}, "epochs must be"),
        ({"warmup_epochs": -1}, "warmup_epochs must be"),
        ({"warmup_epochs": 91}, "longer than epochs"),
        ({"warmup_start_factor": 1.5}, "warmup_start_factor"),
        ({"decay_factor": 0.0}, "decay_factor"),
        ({"decay_epochs": (30, 30)}, "increase"),
        ({"decay_epochs": (10, 30)}, "inside the 15 of warm-up"),
        ({"min_lr": 0.1}, "min_lr 0.1 is for cosine"),
        ({"min_lr": -0.1}, "min_lr must be"),
    ],
)
def test_bad_fields_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PAPER, **change)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one whole batch"):
        lr_at(PAPER, 0, 100, 101)
    with pytest.raises(ValueError, match="-1 samples seen"):
        lr_at(PAPER, -1, 1024, 256)
    with pytest.raises(ValueError, match="above the peak"):
        lr_at(Schedule(kind="cosine", base_lr=0.1, epochs=1, min_lr=0.5), 0, 1024, 256)


def test_a_list_of_decays_from_a_file_is_taken() -> None:
    assert Schedule(kind="step", base_lr=1, epochs=3, decay_epochs=[1, 2]).decay_epochs == (1, 2)  # type: ignore[arg-type]

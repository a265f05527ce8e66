"""The same training on every engine: 20 steps, and a check that turns red for each planted fault."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pytest
from helpers_engine import jobs
from workers import parity

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
ZERO = [engine for engine in ENGINES if engine.startswith("zero")]


@functools.cache
def losses(engine: str, case: str) -> tuple[tuple[float, ...], ...]:
    """The losses of the global batches, as each rank knows them."""
    return tuple(tuple(rank[case]["loss"]) for rank in jobs(engine, 1 if engine == "single" else 2)["parity"])


def check_same_training(found: Sequence[Sequence[float]], reference: Sequence[float]) -> None:
    """AssertionError unless every rank's losses are the reference's within 1e-4, and training went somewhere."""
    assert len(reference) == parity.STEPS
    assert abs(reference[-1] - reference[0]) >= 0.1 * reference[0], "the loss hardly changes: nothing is compared"
    for rank in found:
        np.testing.assert_allclose(rank, reference, rtol=0, atol=1e-4)


@pytest.mark.parametrize("optimizer", list(parity.OPTIMIZERS))
@pytest.mark.parametrize("engine", ENGINES)
def test_twenty_steps_are_the_same_as_in_one_process(engine: str, optimizer: str) -> None:
    check_same_training(losses(engine, optimizer), losses("single", optimizer)[0])


@pytest.mark.parametrize("fault", parity.FAULTS)
@pytest.mark.parametrize("engine", parity.FAULTY)
def test_a_planted_fault_turns_the_check_red(engine: str, fault: str) -> None:
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_same_training(losses(engine, fault), losses("single", "sgd")[0])


@pytest.mark.parametrize("engine", ZERO)
def test_deepspeeds_own_clipping_turns_the_check_red(engine: str) -> None:
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_same_training(losses(engine, "clipping"), losses("single", "sgd")[0])


def test_the_data_has_a_rank_without_any_known_label() -> None:
    """A mean over each rank's own labels would weigh its samples wrongly, or be NaN."""
    step, number, rank = parity.BLANK
    known = np.array([found["sgd"]["known"] for found in jobs("ddp", 2)["parity"]])
    assert known.shape == (2, parity.STEPS, parity.ACCUMULATION)
    assert known[rank, step, number] == 0
    assert (known.sum(axis=(0, 2)) > 0).all() and len(np.unique(known)) > 3, "unknown labels must be unevenly spread"


def test_agc_clips_some_units_and_not_others() -> None:
    shares = jobs("single", 1)["parity"][0]["sgd_agc"]["clipped"]
    assert all(0.05 < share < 0.95 for share in shares)

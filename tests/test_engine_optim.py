"""SGD_AGC under each sharded engine equals the single process: units over several ranks, empty shards, clipping."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from helpers_engine import jobs
from workers import common, optimizing

from scaletransfer.engine.strategy import Strategy

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
SOUND = list(optimizing.CASES)
slow = pytest.mark.slow
LAUNCHES = [
    *[(engine, 2) for engine in ("fsdp2", "zero2", "zero3")],
    *[pytest.param(engine, 2, marks=slow) for engine in ("zero1", "zero3_offload")],
    *[pytest.param(engine, 3, marks=slow) for engine in ("fsdp2", "zero1", "zero2", "zero3", "zero3_offload")],
    *[pytest.param(engine, 1, marks=slow) for engine in ("fsdp2", "zero1", "zero2", "zero3")],
    pytest.param("hsdp", 4, marks=slow),
]
Found = dict[str, Any]


@functools.cache
def single() -> dict[str, Found]:
    """The same cases in one process without any wrapper, here."""
    strategy = Strategy(engine="single", world=1, rank=0, local_rank=0, local_world=1, cpu=True)
    found = {name: optimizing.train(strategy, case) for name, case in optimizing.CASES.items()}
    common.forget_engine()
    return found


def whole(ranks: Sequence[Found], what: str, copies: int = 1) -> dict[str, np.ndarray]:
    """Parameters (or momentum) put together from the ranks' pieces, which must cover each exactly ``copies`` times.

    Copies must be equal to the last bit: nothing would bring them together again.
    """
    values: dict[str, np.ndarray] = {}
    seen: dict[str, np.ndarray] = {}
    for rank in ranks:
        for piece in rank["pieces"]:
            size = math.prod(piece["shape"])
            target = values.setdefault(piece["name"], np.full(size, np.nan))
            count = seen.setdefault(piece["name"], np.zeros(size, dtype=int))
            here = slice(piece["start"], piece["stop"])
            found = np.zeros(piece["stop"] - piece["start"]) if piece[what] is None else np.array(piece[what])
            assert (np.isnan(target[here]) | (target[here] == found)).all(), f"copies of {piece['name']} differ"
            target[here] = found
            count[here] += 1
    assert all((count == copies).all() for count in seen.values()), "the ranks' pieces overlap or leave gaps"
    return values


def cuts(ranks: Sequence[Found]) -> tuple[set[str], set[str]]:
    """Names of parameters of which a rank ends inside a unit, and of those of which a rank holds nothing."""
    straddling, empty = set(), set()
    for rank in ranks:
        for piece in rank["pieces"]:
            size = math.prod(piece["shape"])
            unit = size // piece["shape"][0] if len(piece["shape"]) > 1 else size
            if piece["stop"] == piece["start"]:
                empty.add(piece["name"])
            elif piece["stop"] % unit:
                straddling.add(piece["name"])
    return straddling, empty


@pytest.mark.parametrize(("engine", "world"), LAUNCHES)
def test_every_clipping_variant_equals_the_single_process(engine: str, world: int) -> None:
    ranks = jobs(engine, world)["optimizing"]
    for name in SOUND:
        mine, reference = [rank[name] for rank in ranks], single()[name]
        assert all(0.05 <= share <= 0.95 for share in reference["steps"]["clipped"]), (name, reference["steps"])
        for rank in mine:
            for number in ("loss", "norm", "clipped"):
                np.testing.assert_allclose(
                    rank["steps"][number], reference["steps"][number], rtol=1e-6, atol=1e-6, err_msg=f"{name}, {number}"
                )
        for what in ("values", "momentum"):
            expected = whole([reference], what)
            found = whole(mine, what, copies=2 if engine == "hsdp" else 1)
            assert found.keys() == expected.keys()
            for tensor, value in expected.items():
                np.testing.assert_allclose(
                    found[tensor], value, rtol=0, atol=1e-6, err_msg=f"{name}, {what} of {tensor}"
                )


@pytest.mark.parametrize(
    ("engine", "world"), [launch for launch in LAUNCHES if getattr(launch, "values", launch)[1] > 1]
)
def test_the_launches_have_what_makes_sharding_hard(engine: str, world: int) -> None:
    """Units over several ranks, and under FSDP2 and ZeRO ranks that hold nothing of a parameter: seen, not assumed."""
    straddling, empty = cuts([rank["corrected"] for rank in jobs(engine, world)["optimizing"]])
    clipped = straddling - {"conv.head.weight", "conv.head.bias"}
    assert clipped, "no unit of a clipped parameter lies on two ranks"
    assert empty, "every rank holds something of every parameter"
    if "zero" in engine:  # FSDP2 cuts between rows, so that vectors alone straddle
        sizes = {piece["name"]: len(piece["shape"]) for piece in single()["corrected"]["pieces"]}
        assert any(sizes[name] >= 2 for name in clipped), "no row of a matrix or convolution is cut"


def test_the_cases_differ_by_far_more_than_the_tolerance() -> None:
    """Clipping, who is exempt, decay and nesterov each matter, so that equality above says something."""
    weights = {name: whole([single()[name]], "values") for name in SOUND}
    for name in ("paper", "nesterov", "no momentum"):
        gap = max(np.abs(weights[name][tensor] - value).max() for tensor, value in weights["corrected"].items())
        assert gap > 1e-3, name


def test_a_parameter_without_gradient_stays_as_it_is() -> None:
    before = whole([single()["unused"]], "values")["unused"]
    for rank in jobs("zero2", 2)["optimizing"]:
        for piece in rank["unused"]["pieces"]:
            if piece["name"] == "unused":
                np.testing.assert_array_equal(piece["values"], before[piece["start"] : piece["stop"]])

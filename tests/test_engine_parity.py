"""The same training on every engine: 20 steps, and a check that turns red for each planted fault."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from helpers_engine import jobs
from workers import parity

# isort: split
from bench import parity as tool
from bench.parity_worker import BLANK, GLOBAL_BATCH, STEPS, Case, pairwise_cases, precisions

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
# Each of these launches serves tests in other files as well.
LAUNCHES = (
    *((engine, 2) for engine in ("ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload")),
    *(("fsdp2", 3), ("zero2", 3), ("hsdp", 4)),
)
FAULTY = [(engine, 4 if engine == "hsdp" else 2) for engine in parity.FAULTY]
ZERO = [engine for engine, world in LAUNCHES if engine.startswith("zero") and world == 2]


def single() -> tool.Found:
    """The runs that all are compared with."""
    return jobs("single", 1)["parity"][0]


def check_same_training(engine: str, world: int, case: Case, name: str | None = None) -> None:
    """AssertionError unless the run of that name is the single process's within the promised bounds."""
    reference = single()
    ranks = [{case.name: rank[name or case.name]} for rank in jobs(engine, world)["parity"]]
    for precision in {case.precision, "fp64"}:
        found = tool.gap(case, precision, ranks, reference)
        assert tool.within(case, precision, found), f"another training: {found} from {precision}"


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize(("engine", "world"), [("single", 1), *LAUNCHES])
def test_twenty_steps_are_the_same_as_in_one_process(engine: str, world: int, precision: str) -> None:
    if precision not in precisions(engine):
        pytest.skip("DeepSpeed trains in float32 at most")
    for case in pairwise_cases(engine):
        if case.precision == precision:
            check_same_training(engine, world, case)


@pytest.mark.parametrize("fault", parity.FAULTS)
@pytest.mark.parametrize(("engine", "world"), FAULTY)
def test_a_planted_fault_turns_the_check_red(engine: str, world: int, fault: str) -> None:
    with pytest.raises(AssertionError, match="another training"):
        check_same_training(engine, world, parity.FAULTY_CASE, fault)


@pytest.mark.parametrize("engine", ZERO)
def test_deepspeeds_own_clipping_turns_the_check_red(engine: str) -> None:
    with pytest.raises(AssertionError, match="another training"):
        check_same_training(engine, 2, parity.FAULTY_CASE, "clipping")


def test_the_cases_let_every_two_settings_meet() -> None:
    for engine in ("zero1", "fsdp2"):
        cases = pairwise_cases(engine)
        settings = [(c.optimizer, c.task, c.accumulation, c.checkpointing, c.precision) for c in cases]
        for first in range(5):
            for second in range(first):
                seen = {(values[second], values[first]) for values in settings}
                every = {(a, b) for a in {v[second] for v in settings} for b in {v[first] for v in settings}}
                assert seen == every, (engine, first, second)


@pytest.mark.parametrize(("engine", "world"), LAUNCHES)
def test_the_data_has_a_rank_without_any_known_label(engine: str, world: int) -> None:
    """A mean over each rank's own labels would weigh its samples wrongly, or be NaN."""
    name = Case(optimizer="sgd", task="multilabel").name
    known = np.array([found[name]["known"] for found in jobs(engine, world)["parity"]])
    assert known.shape == (world, STEPS, 1)
    blind = len(BLANK) * world // GLOBAL_BATCH
    assert blind >= 1 and not known[:blind, 0].any()
    assert (known.sum(axis=(0, 2)) > 0).all() and len(np.unique(known)) > 3, "unknown labels must be unevenly spread"


def test_agc_clips_some_units_and_not_others() -> None:
    for name, run in single().items():
        if name.startswith("sgd_agc"):
            most = 0.9 if "multilabel" in name else 0.999
            assert all(0.1 < share < most for share in run["clipped"]), (name, run["clipped"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("engine", "world"), tool.launches())
def test_every_case_of_every_engine_and_world(
    engine: str, world: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    found, reference = whole_table(engine, world, tmp_path_factory.getbasetemp() / "parity-references")
    line, beyond = tool.row(engine, found, reference)
    assert not beyond, "\n".join(beyond)
    assert line.startswith(f"| {engine} | {world} | ")


@functools.cache
def whole_single(references: Path) -> tool.Found:
    references.mkdir()
    return tool.launch("single", 1, references)[0]


def whole_table(engine: str, world: int, references: Path) -> tuple[list[tool.Found], tool.Found]:
    reference = whole_single(references)
    return ([reference] if engine == "single" else tool.launch(engine, world, references)), reference


# --- the tool --------------------------------------------------------------------------------------------------------


def test_a_run_out_of_bounds_is_named() -> None:
    case = Case(optimizer="sgd", task="multilabel")
    run = {"loss": [2.0, *[1.0] * (STEPS - 1)], "weights": {"fp32": 2e-4, "fp64": 1e-7}}
    found = dict.fromkeys((c.name for c in tool.all_cases("single")), run)
    line, beyond = tool.row("zero1", [found, found], found)
    assert line == "| zero1 | 2 | 16 | 0.0e+00 | 2.0e-04 | 0.0e+00 | 1.0e-07 |  |  |"
    assert len(beyond) == 16 and f"zero1 on 2 ranks, {case.name}: losses are 0.0e+00 and weights 2.0e-04" in beyond[0]

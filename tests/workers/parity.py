"""Single runs of tools/bench/parity_worker.py under any engine, sound or with one planted fault."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from bench import parity_worker
from bench.parity_worker import Case, pairwise_cases
from workers.common import forget_engine

from scaletransfer.engine import step as step_module
from scaletransfer.engine.build import Engine
from scaletransfer.engine.strategy import Strategy

FAULTY_CASE = Case(optimizer="sgd", task="multilabel", accumulation=2)
FAULTS = ("accumulation", "data", "initialisation")
FAULTY = ("ddp", "fsdp2", "hsdp", "zero2")
"""The engines under which the faults are planted; DeepSpeed's clipping under every ZeRO stage."""


def cases(engine: str, processes: int) -> dict[str, dict[str, Any]]:
    """The sound runs, and for engines of several processes the faulty ones."""
    sound = pairwise_cases(engine)
    found: dict[str, dict[str, Any]] = {case.name: {"case": dataclasses.asdict(case), "fault": None} for case in sound}
    faults: tuple[str, ...] = ()
    if processes == (4 if engine == "hsdp" else 2):
        faults = (FAULTS if engine in FAULTY else ()) + (("clipping",) if engine.startswith("zero") else ())
    return found | {fault: {"case": dataclasses.asdict(FAULTY_CASE), "fault": fault} for fault in faults}


@contextmanager
def planted(fault: str | None) -> Any:
    """Makes the run wrong as somebody might: none of these raises anything by itself."""
    with ExitStack() as stack:

        def patch(target: Any, name: str, wrong: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, wrong))

        if fault == "accumulation":  # the loss is not scaled for it
            backward = step_module._backward
            patch(step_module, "_backward", lambda engine, loss: backward(engine, loss / engine.accumulation))
        if fault == "data":  # every rank reads what the first is to read
            positions = parity_worker.rank_positions
            patch(parity_worker, "rank_positions", lambda step, rank, *rest: positions(step, 0, *rest))
        if fault == "initialisation":
            initial = parity_worker.initial_tensors
            patch(parity_worker, "initial_tensors", lambda skeleton, seed: initial(skeleton, seed + 1))
        if fault == "clipping":
            build = parity_worker.build_engine

            def clipped(*args: Any, **options: Any) -> Engine:
                engine = build(*args, **options)
                engine.zero.clip_grad = 1.0
                return engine

            patch(parity_worker, "build_engine", clipped)
        yield


def train(strategy: Strategy, case: dict[str, Any], references: str) -> dict[str, Any]:
    """What `parity_worker.train` returns; a faulty run is further from the reference."""
    forget_engine()
    with planted(case["fault"]):
        return parity_worker.train(strategy, Case(**case["case"]), Path(references))

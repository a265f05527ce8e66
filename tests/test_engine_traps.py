"""Each silent failure of the engines, sprung on purpose: refused with one sentence, nothing trained, nothing saved."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
from helpers_data import SALT, make_chexpert
from helpers_engine import ROOT, launch
from workers.traps import TRAPS

from scaletransfer import make_shards

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
SENTENCES = {
    # of a mesh accelerate itself says that the processes do not fit it
    "world 1": r"process \d of 2 but accelerate believes that this is process 0 of 1|not match num_processes \(1\)",
    "ignored": "asked for but accelerate runs MULTI_CPU|ParallelismConfig .* but got DistributedType.MULTI_CPU",
    "not sharded": "asked for but the model runs as BiT: the engine was ignored",
    "bare model": "asked for but the model runs as BiT: the engine was ignored",
    "prepare makes DDP": "asked for but the model runs as DistributedDataParallel",
    "model swapped for DDP": "asked for but the model runs as DistributedDataParallel",
    "half masters": "bfloat16, not float32",
    "half reduction": "reduces gradients in torch.bfloat16",
    "clipping by default": "DeepSpeed clips gradients to 1.0",
    "clipping 1.0": "DeepSpeed clips gradients to 1.0",
    "clipping 0 dropped": "DeepSpeed clips gradients to 1.0",
    "another stage": "zero2 was asked for but gradients are not split",
    "accumulation": "DeepSpeed accumulates 1 micro-batches, not 2",
    "no gradient": r"2 parameters got no gradient, first \['spare.bias'\]: zero2 would decay them",
    "optimizer replaced": "DeepSpeed steps another optimizer than the SGD_AGC it was given: Adam$",
    "DeepSpeedCPUAdam": "DeepSpeed steps another optimizer than the SGD_AGC it was given: DeepSpeedCPUAdam$",
    "not offloaded": "zero3_offload was asked for but DeepSpeed does not keep parameters and optimizer state in",
    "backward steps": "the optimizer stepped inside backward",
    "no layout": "SGD_AGC steps a sharded or flat tensor of unknown layout",
    "sums of one rank": "SGD_AGC adds up norms over other ranks than those that share a copy of the model",
    "optimizer before sharding": "the optimizer steps other tensors than those that hold the model's parameters",
    "mesh ignored": r"hsdp was asked for but .* is not sharded over 2 x 2 ranks",
    "rounded first": r"in bf16 rounds weights before they are standardised, and filter 5 of body.block2.unit01.conv2",
    "without transformers": r"zero2 needs the package transformers: pip install 'scaletransfer\[deepspeed\]'",
    "dispatcher": "step 0: the ranks read . different samples of the 8",
    "another optimizer class": "the optimizer that steps is SGD, not SGD_AGC",
    "optimizer swapped": "another optimizer|the optimizer that steps is Adam, not SGD_AGC",
    "positions": "step 0: the ranks read [24] different samples of the 8",
    "scaled gradient": "clipped or scaled on the way",
}
WORLDS = {engine: 4 if engine == "hsdp" else 2 for engine in TRAPS}
ENGINES = [
    pytest.param(engine, marks=pytest.mark.slow if engine in ("hsdp", "zero3_offload") else ()) for engine in TRAPS
]
CASES = [
    pytest.param(engine.values[0], name, marks=engine.marks)
    for engine in ENGINES
    for name in TRAPS[engine.values[0]]  # type: ignore[index]
]


@functools.cache
def shards(folder: Path) -> Path:
    """A small set of drawn X-rays."""
    salt = folder / "salt"
    salt.write_bytes(SALT)
    root = make_chexpert(folder / "CheXpert-v1.0", rows=24, valid=0, laterals=False)
    options = ["--root", str(root), "--out", str(folder / "shards"), "--salt-file", str(salt)]
    assert make_shards.main(["chexpert", *options]) == 0
    return folder / "shards"


@functools.cache
def sprung(engine: str, folder: Path) -> list[dict[str, Any]]:
    """What every rank saw of all traps of an engine, and of a sound run after them (None)."""
    options = [
        *(
            "--config",
            str(ROOT / "configs" / "parts" / "tiny.yaml"),
            "--config",
            str(ROOT / "configs" / "chexpert_tiny.yaml"),
        ),
        *(f"data.train={shards(folder)}", "data.image_size=32", "data.workers=0", "global_batch=8", "micro_batch=2"),
        *("max_steps=2", "checkpoint.every_steps=1", "log.every_steps=1", "validate.every_epochs=null"),
        *("optimizer.name=sgd_agc", "optimizer.weight_decay=1e-4", "precision=fp32"),
    ]
    return launch(engine, WORLDS[engine], "traps", {"engine": engine, "options": options})


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traps")


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_a_trap_is_refused_with_one_sentence(engine: str, name: str, folder: Path) -> None:
    for rank in sprung(engine, folder):
        found = rank[name]
        assert found["status"] == 2, found
        assert len(found["error"]) == 1, found
        assert re.search(SENTENCES[name], found["error"][0]), found
        assert (found["saved"], found["steps"]) == ([], []), found


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_run_without_a_trap_trains_and_saves(engine: str, folder: Path) -> None:
    for rank in sprung(engine, folder):
        found = rank["None"]
        assert (found["status"], found["error"]) == (0, []), found
        assert "step-00000002" in found["saved"]
        assert found["steps"] == [1, 2]

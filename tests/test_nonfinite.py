"""A loss that is NaN: its step is left out on every rank, weights and momentum untouched, up to the number allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers_run import build_single, launch, make_shards, rows, write_config
from workers_stopping import acting

from scaletransfer.engine import trainer as trainers
from scaletransfer.engine.checkpoint import Checkpoint, open_checkpoint

pytestmark = pytest.mark.timeout(900)

CONFIG = """\
seed: 3
epochs: 2
global_batch: 16
micro_batch: 4
precision: fp32
model: {name: BiT-tiny}
data: {image_size: 32, workers: 1, augment_protocol: corrected}
optimizer: {name: sgd_agc, base_lr: 0.05, clipping: 0.02}
schedule: {kind: cosine, warmup_epochs: 0.5}
checkpoint: {every_steps: 1, every_minutes: null, keep: 100}
log: {every_steps: 2, tensorboard: false}
validate: {every_epochs: null}
"""
POISONED = [1, 4, 5]  # the first step as well: the engine is verified in the second then


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("nonfinite")


@pytest.fixture(scope="module")
def config(base) -> Path:
    return write_config(base, make_shards(base, rows=67, valid=4, shard_size=30), CONFIG)


def saved(run: Path, step: int) -> Checkpoint:
    return open_checkpoint(run / "checkpoints" / f"step-{step:08d}")


def same(one: Checkpoint, two: Checkpoint) -> bool:
    """Weights and momentum, bit for bit. A momentum that is not there yet is none."""
    names = set(one.parts) & set(two.parts)
    assert any(name.startswith("model.") for name in names)
    return all(torch.equal(one.read(name), two.read(name)) for name in names)


def check(run: Path, poisoned: list[int]) -> None:
    """Every step is there once, and only the poisoned ones moved nothing and left their batch."""
    found = rows(run)
    assert [row["step"] for row in found if row.get("event") == "skipped"] == poisoned
    assert [row["step"] for row in found if "event" not in row] == [s for s in range(1, 9) if s not in poisoned]
    for step in range(2, 9):
        assert same(saved(run, step - 1), saved(run, step)) == (step in poisoned), step
    assert saved(run, 8).facts["skipped"] == len(poisoned)
    for step in poisoned:
        kept = json.loads((run / f"nonfinite-step-{step:08d}.json").read_text())
        assert kept["loss"] == "nan" and sorted(kept["positions"]) == list(range(16 * step - 16, 16 * step))
        assert len(kept["keys"]) == 16 and all(key.startswith("chexpert-") for key in kept["keys"])


def poison(monkeypatch: pytest.MonkeyPatch, steps: list[int]) -> None:
    monkeypatch.setattr(trainers, "train_step", trainers.train_step)  # put back at the end
    acting.patch({"rank": 0, "at": "loss", "number": steps, "do": "nan"})


@pytest.mark.parametrize("optimizer", ["sgd_agc", "sgd"])
def test_one_process_leaves_out_as_many_as_it_may(config, base, monkeypatch, optimizer):
    poison(monkeypatch, POISONED)
    options = ("micro_batch=16", "data.workers=0", "failing.skip_nonfinite=3", f"optimizer.name={optimizer}")
    build_single(config, f"name={optimizer}", *options).run()
    check(base / "runs" / optimizer, POISONED)


def test_one_more_stops_the_run_also_after_a_resume(config, base, monkeypatch):
    options = ("name=more", "micro_batch=16", "data.workers=0", "failing.skip_nonfinite=2")
    poison(monkeypatch, [2, 3])
    build_single(config, *options, "max_steps=4").run()
    monkeypatch.undo()
    poison(monkeypatch, [2])  # of this process: step 6
    with pytest.raises(ValueError, match=r"step 6 is number 3 whose loss .*/nonfinite-step-00000006\.json"):
        build_single(config, *options).run()
    assert (base / "runs" / "more" / "nonfinite-step-00000006.json").exists()
    assert not (base / "runs" / "more" / "checkpoints" / "step-00000006").exists()


def on_all_ranks(config: Path, base: Path, engine: str, *options: str) -> None:
    name = "-".join([engine, *(option.split("=")[1] for option in options)])
    case = {"rank": 1, "at": "loss", "number": POISONED, "do": "nan"}
    arguments = [json.dumps(case), "--config", str(config), f"name={name}", "failing.skip_nonfinite=3", *options]
    run = launch(engine, arguments, base, module="workers_stopping.acting", world=4 if engine == "hsdp" else 2)
    try:
        assert run.wait() == 0, run.text()
    finally:
        run.end()
    check(base / "runs" / name, POISONED)


@pytest.mark.engine
def test_zero2_leaves_it_out_on_both_ranks(config, base):
    on_all_ranks(config, base, "zero2")


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize(
    "engine, options",
    [
        ("ddp", ()),
        ("fsdp2", ()),
        ("fsdp2", ("precision=bf16",)),
        ("hsdp", ()),
        ("hsdp", ("optimizer.name=sgd",)),
        ("zero1", ()),
        ("zero3", ()),
        ("zero3", ("optimizer.name=sgd",)),
        ("zero3", ("precision=bf16",)),
        ("zero3_offload", ()),
        ("zero3_offload", ("optimizer.name=sgd",)),
        ("zero2", ("optimizer.name=sgd", "precision=bf16")),
        ("zero1", ("precision=bf16",)),
        ("fsdp2", ("optimizer.name=sgd",)),
    ],
)
def test_every_engine_leaves_it_out_on_all_ranks(config, base, engine, options):
    on_all_ranks(config, base, engine, *options)

"""A network with dropout resumes as if nothing had happened: its generators are seeded and stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.nn.functional as F
from helpers_run import make_shards, run_single, steps, write_config
from torch import nn

from scaletransfer.engine import assemble, trainer
from scaletransfer.engine.checkpoint import open_checkpoint

CONFIG = """\
seed: 3
epochs: 2
global_batch: 16
micro_batch: 16
precision: fp32
model: {name: BiT-tiny}
data: {image_size: 16, workers: 0}
optimizer: {name: sgd, base_lr: 0.5}
schedule: {kind: cosine, warmup_epochs: 0}
checkpoint: {every_steps: 100, every_minutes: null}
log: {every_steps: 1, tensorboard: false}
validate: {every_steps: 2}
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dropout")
    return write_config(folder, make_shards(folder, rows=64, valid=8), CONFIG)


@pytest.fixture(autouse=True)
def dropout(monkeypatch) -> None:
    """Half of what the body gives is dropped in training."""
    original = assemble.make_network

    def make(*arguments):
        network = original(*arguments)

        def drop(module: nn.Module, inputs: object, output):
            return F.dropout(output, 0.5, module.training)

        network.body.register_forward_hook(drop)
        return network

    monkeypatch.setattr(assemble, "make_network", make)


def losses(config: Path, name: str, *stops: str) -> list[float]:
    """Of a run that is stopped and started again at some steps; "8" is its end."""
    for stop in stops:
        run_single(config, f"name={name}", f"max_steps={stop}")
    return [row["loss"] for row in steps(config.parent / "runs" / name)]


def test_dropout_goes_on_where_it_was(bench, monkeypatch):
    """Also over a validation, whose loader draws from the same generator."""
    whole = losses(bench, "whole", "8")
    assert losses(bench, "again", "3", "6", "8") == whole
    found = open_checkpoint(bench.parent / "runs" / "again" / "checkpoints" / "step-00000003")
    assert list(found.manifest["ranks"][0]["rng"]) == ["cpu"]
    monkeypatch.setattr(trainer, "set_generators", lambda states, device: None)
    forgetful = losses(bench, "forgetful", "3", "8")
    assert forgetful[:3] == whole[:3] and forgetful[3:] != whole[3:]


def test_dropout_follows_the_seed_and_the_rank(bench, monkeypatch):
    """With equal values, images and labels, another seed of the generators gives another loss."""
    first = losses(bench, "first", "1")[0]
    original = assemble.seed_generators
    monkeypatch.setattr(assemble, "seed_generators", lambda seed, rank, step: original(seed, rank + 1, step))
    assert losses(bench, "second", "1")[0] != first

"""A global batch in which no label is known trains nothing, on one process and on several."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import SALT, draw_image, make_chexpert
from helpers_engine import command, environment
from helpers_run import REPOSITORY, build_single, write_config

from scaletransfer.engine.checkpoint import find_latest, model_values, open_checkpoint
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import Record, Source, open_source


class Silent(Source):
    """CheXpert-like rows of which those behind the first `spoken` say nothing about any finding."""

    name, task, licence, public = "chexpert", "multilabel", "none", False

    def __init__(self, root: Path, spoken: int = 0, count: int = 32) -> None:
        super().__init__(root)
        self.label_names = open_source("chexpert", make_chexpert(root / "names", rows=8, valid=4)).label_names
        self.spoken, self.count = spoken, count
        for number in range(count):
            draw_image(root / f"{number}.png", number)

    def __iter__(self):
        for number in range(self.count):
            state = number % 2 if number < self.spoken else -2
            labels = tuple(-2 if name == "No Finding" else state for name in self.label_names)
            image, key = f"{number}.png", str(number)
            yield Record(source_id=key, split="train", patient="", image=image, labels=labels, view="PA")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("unknown")
    build(plan_shards(Silent(base), SALT, shard_size=8), base / "shards")
    return write_config(base, base / "shards")


OVERRIDES = ("validate.every_epochs=null", "max_steps=3", "data.workers=0", "optimizer.weight_decay=0.1")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    latest = find_latest(folder / "checkpoints")
    assert latest is not None and latest.name.endswith("3")
    found = open_checkpoint(latest)
    values = model_values(found)
    shapes = json.loads((latest / "manifest.json").read_text())
    return {name: values(name) for name in _names(shapes)}


def _names(manifest: dict) -> list[str]:
    return sorted({name.removeprefix("model.") for name in manifest["tensors"] if name.startswith("model.")})


def test_one_process_changes_nothing(config):
    trainer = build_single(config, "name=one", *OVERRIDES)
    before = {name: value.clone() for name, value in trainer.engine.module.state_dict().items()}
    trainer.run()
    after = trainer.engine.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(state for state in trainer.engine.optimizer.state.values())
    rows = [json.loads(line) for line in (config.parent / "runs/one/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["loss"] for row in steps] == [0, 0, 0] and [row["grad_norm"] for row in steps] == [0, 0, 0]


def test_a_silent_batch_between_others_is_passed_over(tmp_path):
    """Two of four rows a batch say nothing; a batch of those alone leaves weights and momentum where they were."""
    build(plan_shards(Silent(tmp_path, spoken=4, count=64), SALT, shard_size=64), tmp_path / "shards")
    config = write_config(tmp_path, tmp_path / "shards")
    options = ("global_batch=4", "micro_batch=4", "validate.every_epochs=null", "max_steps=16", "data.workers=0")
    trainer = build_single(config, "name=some", *options)
    seen = []

    def watch(step: int, group, first, known: bool):
        state = trainer.engine.optimizer.state
        before = [value.clone() for value in trainer.engine.module.state_dict().values()]
        before += [entry["momentum_buffer"].clone() for entry in state.values()]
        result = type(trainer)._step(trainer, step, group, first, known)
        after = list(trainer.engine.module.state_dict().values())
        after += [entry["momentum_buffer"] for entry in state.values()]
        moved = len(before) != len(after) or any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        targets = torch.cat([batch["target"] for batch in group])
        seen.append((bool((~targets.isnan()).any()), known, moved))
        return result

    trainer._step = watch
    trainer.run()
    assert len(set(seen)) == 2, "both kinds of batch must come up"
    for has_label, known, moved in seen:
        assert has_label == known == moved
    assert all(np.isfinite(value.numpy()).all() for value in trainer.engine.module.state_dict().values())


@pytest.mark.engine
@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow), "zero2"])
def test_two_ranks_change_nothing(config, engine):
    from scaletransfer.engine.assemble import starting_values  # what the seed gives

    argv = ["scaletransfer.pretrain", "--config", str(config), f"name={engine}", *OVERRIDES]
    done = subprocess.run(
        command(engine, 2, *argv),
        check=False,
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    trainer = build_single(config, f"name=start_{engine}", *OVERRIDES)
    born, _ = starting_values(trainer.cfg, None, trainer.names, trainer.engine.module)
    found = weights(config.parent / "runs" / engine)
    assert found and all(torch.equal(value, born(name)) for name, value in found.items())

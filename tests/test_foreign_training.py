"""Training on tars that others made: every sample once on any number of ranks, and whole runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers_foreign import index_of, states, write_cls, write_json
from helpers_loader import dataset, source
from helpers_run import launch_to_end, run_single, steps, write_config

from scaletransfer import pretrain
from scaletransfer.cli import run_command
from scaletransfer.order import rank_positions


def test_every_sample_once_an_epoch_on_any_number_of_ranks(tmp_path):
    """With the pixels and labels of its own member; the same batches whoever reads them."""
    folder = write_json(tmp_path / "films", "train", 26)
    index = index_of(folder, "--label", "json:findings")
    keys = index.table("train")["key"].view(np.int64)
    labels = {int(key): states(number) for number, key in enumerate(keys)}
    reference: list[list[int]] = []
    for world, micro in ((1, 6), (2, 3), (3, 1)):
        steps: list[list[int]] = []
        pixels: dict[int, bytes] = {}
        for step in range(4):  # 4 * 6 of 26: the last incomplete global batch is left out
            steps.append([])
            for rank in range(world):
                data = dataset([source(index)], batch=6)
                for part in rank_positions(step, rank, world, micro, 6).tolist():
                    batch = data.__getitems__(part)
                    assert batch["position"].tolist() == part
                    for key, target, image in zip(batch["key"].tolist(), batch["target"], batch["image"], strict=True):
                        expected = [np.nan if state < 0 else state for state in labels[key]]
                        np.testing.assert_array_equal(target.numpy(), expected)
                        pixels[key] = image.numpy().tobytes()
                        steps[-1].append(key)
        read = sorted(key for step in steps for key in step)
        assert len(read) == 24 == len(set(read)) and set(read) <= set(keys.tolist()) and len(set(pixels.values())) == 24
        reference = reference or steps
        assert steps == reference


@pytest.fixture
def config(tmp_path) -> Path:
    """Of a run of two steps on tars that others made."""
    folder = write_cls(tmp_path / "set", "train", 17, extensions=("jpg", "png"))
    write_cls(folder, "val", 5, start=50)
    return write_config(tmp_path, folder, TWO_STEPS)


TWO_STEPS = """\
seed: 3
epochs: 1
global_batch: 8
micro_batch: 8
precision: fp32
model: {name: BiT-tiny}
data: {image_size: 32, workers: 0, format: webdataset, transform: natural}
optimizer: {name: sgd, base_lr: 0.1}
schedule: {kind: cosine, warmup_epochs: 0}
log: {every_steps: 1, tensorboard: false}
validate: {every_epochs: 1}
"""


def command(capfd: pytest.CaptureFixture[str], config: Path, *overrides: str) -> tuple[int, str]:
    """Exit status and stderr of pretrain in this process."""
    status = run_command(pretrain.main, ["--config", str(config), *overrides])
    return status, capfd.readouterr().err


def test_two_steps_of_training(config, tmp_path, capfd):
    """And what is said before the tars have an index, or of the wrong format."""
    status, err = command(capfd, config, "name=run")
    assert status == 2 and f"error: {tmp_path / 'set'} has no index.json" in err and "scaletransfer shards index" in err
    index_of(tmp_path / "set")
    status, err = command(capfd, config, "name=run", "data.format=shards")
    assert status == 2 and "set data.format to webdataset" in err
    status, err = command(capfd, config, "name=run")
    assert status == 0, err
    assert len(steps(tmp_path / "runs" / "run")) == 2
    status, err = command(capfd, config, "name=other", f"data.train={Path(__file__).parents[1] / 'shards' / 'sample'}")
    assert status == 2 and "set data.format to shards" in err


@pytest.mark.engine
def test_the_same_training_on_two_ranks(config, tmp_path):
    index_of(tmp_path / "set")
    run_single(config, "name=one")
    launch_to_end("ddp", ["--config", str(config), "name=two", "micro_batch=4"], tmp_path)
    losses = [[row["loss"] for row in steps(tmp_path / "runs" / name)] for name in ("one", "two")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)

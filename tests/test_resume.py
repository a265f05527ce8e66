"""Starting again on one process: what a run cannot change, what it can, when it is done, when it diverges."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers_run import make_shards, rows, run_single, steps, write_config

from scaletransfer import pretrain
from scaletransfer.cli import run_command
from scaletransfer.engine.checkpoint import open_checkpoint

SMALL = """\
seed: 3
epochs: 1
global_batch: 16
micro_batch: 16
precision: fp32
model: {name: BiT-tiny}
data: {image_size: 16, workers: 0}
optimizer: {name: sgd, base_lr: 0.5}
schedule: {kind: cosine, warmup_epochs: 0}
checkpoint: {every_steps: 2, every_minutes: null}
log: {every_steps: 2, tensorboard: false}
validate: {every_epochs: null}
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, Path]:
    """A configuration, and the folder of its finished run of 4 steps on one process."""
    folder = tmp_path_factory.mktemp("small")
    config = write_config(folder, make_shards(folder), SMALL)
    run_single(config, "name=run")
    return config, folder / "runs" / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(capfd: pytest.CaptureFixture[str], config: Path, *overrides: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of pretrain in this process."""
    capfd.readouterr()
    status = run_command(pretrain.main, ["--config", str(config), *overrides])
    out, err = capfd.readouterr()
    return status, out, err


@pytest.mark.parametrize(
    ("override", "fact"),
    [
        ("global_batch=32", "global_batch 16, but this run has 32"),
        ("seed=4", "seed 3, but this run has 4"),
        ("data.policy.name=paper", '"paper"'),
        ("data.policy.uncertain=ones", '"ones"'),
        ("optimizer.name=sgd_agc", 'optimizer "sgd", but this run has "sgd_agc"'),
        ("data.image_size=32", "transform.size"),
        ("data.mean=0.4", "0.4"),
        ("data.train_split=valid", '"valid"'),
        ("model.name=BiT-S-R50x1", 'model "BiT-tiny", but this run has "BiT-S-R50x1"'),
    ],
)
def test_what_cannot_change_is_named(small, capfd, override, fact):
    config, run = small
    before = contents(run)
    status, out, err = command(capfd, config, "name=run", "epochs=2", override)
    assert status == 2 and out == "", err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "a run cannot change it" in err and fact in err and "name=" in err
    assert contents(run) == before


def test_other_shards_are_named(small, capfd, tmp_path):
    config, run = small
    before = contents(run)
    other = make_shards(tmp_path, seed=1)
    status, _, err = command(capfd, config, "name=run", "epochs=2", f"data.train={other}")
    assert status == 2 and err.count("\n") == 1 and "index_sha256" in err and "data" in err
    assert contents(run) == before


def test_how_long_and_how_a_run_computes_may_change(small, capfd, tmp_path):
    config, run = small
    moved = tmp_path / "runs" / "run"
    shutil.copytree(run, moved)
    overrides = [f"run_dir={tmp_path / 'runs'}", "name=run", "epochs=2", "micro_batch=4", "data.workers=1"]
    status, out, err = command(capfd, config, *overrides, "checkpoint.every_steps=3", "log.every_steps=1")
    assert status == 0 and "step 4) to step 8" in out, err
    assert [row["step"] for row in steps(moved)] == list(range(1, 9))


def test_a_finished_run_says_so(small, capfd):
    config, run = small
    before = contents(run)
    status, out, err = command(capfd, config, "name=run")
    assert status == 0 and f"{run} is complete: 4 of 4 steps are done" in out
    assert "error" not in err
    after = contents(run)
    assert {name for name in before if before[name] != after.get(name)} <= {"config.yaml", "environment.json"}
    assert after.keys() == before.keys()


def test_a_loss_that_is_not_finite_stops_the_run(small, capfd):
    config, run = small
    diverged = run.with_name("diverged")
    arguments = ["name=diverged", "optimizer.base_lr=1e30", "schedule.warmup_epochs=0", "checkpoint.every_steps=1"]
    status, _, err = command(capfd, config, *arguments, "epochs=2", "log.every_steps=1")
    lines = [line for line in re.split(r"[\r\n]", err) if "error" in line]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), err
    assert "training has diverged" in lines[0] and "optimizer.base_lr" in lines[0]
    found = rows(diverged)
    stop = found[-1]
    assert stop["event"] == "not finite" and len(stop["keys"]) == 16
    kept = diverged / f"nonfinite-step-{stop['step']:08d}.json"
    assert str(kept) in lines[0] and json.loads(kept.read_text())["keys"] == stop["keys"]
    assert all(key.startswith("chexpert-") for key in stop["keys"])
    saved = sorted(path.name for path in (diverged / "checkpoints").glob("step-*"))
    assert saved and saved == [f"step-{step:08d}" for step in range(1, stop["step"])][-3:]
    for path in (diverged / "checkpoints").glob("step-*"):
        checkpoint = open_checkpoint(path)
        assert all(bool(checkpoint.read(name).isfinite().all()) for name in checkpoint.parts)

"""Acceptance: training from an S3 server that is killed in the middle, and goes on when the server is back."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from helpers_data import SALT, make_image_folder
from helpers_run import launch, launch_to_end, make_shards, rows, steps, write_config
from helpers_transfer import config as transfer_config
from helpers_transfer import losses, make_pretrained

from scaletransfer.checked_sets import open_sets
from scaletransfer.evaluate import evaluate
from scaletransfer.finetune import finetune
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import open_source
from scaletransfer.transfer.data import open_target

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
pytest_plugins = ("helpers_s3",)

CONFIG = """\
seed: 3
epochs: 10
global_batch: 16
micro_batch: 8
precision: fp32
model: {name: BiT-tiny}
data: {image_size: 32, workers: 2, prefetch_mb: 0.05, max_bad_samples: 5}
optimizer: {name: sgd, base_lr: 0.05}
schedule: {kind: cosine, warmup_epochs: 0.5}
checkpoint: {every_steps: 3, every_minutes: null, keep: 2}
log: {every_steps: 1, tensorboard: false}
validate: {every_epochs: 5}
"""
STEPS = 40


def done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    found = re.findall(r'^{"step": (\d+)', path.read_text() if path.exists() else "", flags=re.MULTILINE)
    return int(found[-1]) if found else 0


def test_a_killed_server_ends_the_run_with_a_sentence_and_a_restart_resumes(s3, tmp_path):
    shards = make_shards(tmp_path, rows=66, valid=9)
    config = write_config(tmp_path, shards, CONFIG)
    url = s3.put(shards, "chexpert")
    launch_to_end(None, ["--config", str(config), "name=local"], tmp_path)
    remote = [
        f"data.remote.{text}" for text in (f"cache_dir={tmp_path}/cache", "mode=range", "attempts=3", "timeout=5")
    ]
    arguments = ["--config", str(config), "name=remote", f"data.train={url}", *remote]
    run = launch(None, arguments, tmp_path)
    folder = tmp_path / "runs" / "remote"
    try:
        while done(folder) < 7:
            assert run.process.poll() is None, run.text()
            time.sleep(0.005)
        s3.kill()
        assert run.wait(60) == 2, run.text()
    finally:
        run.end()
    assert re.match(rf"error: {url}/train-00000\d.tar cannot be read after 3 attempts \(", run.error()), run.text()
    assert "Traceback" not in run.text() and "bad sample" not in run.text()
    assert 7 <= done(folder) < STEPS - 3

    s3.restart()
    again = launch_to_end(None, arguments, tmp_path)
    assert re.search(rf"from .* \(step \d+\) to step {STEPS}", again.out.read_text()), again.text()
    assert steps(folder) == steps(tmp_path / "runs" / "local") and len(steps(folder)) == STEPS
    logged = [row for row in rows(folder) if row.get("event") == "log"][-1]
    assert logged["remote_bytes"] > 0 and logged["bad_samples"] == 0 == logged["cache_misses"]


@pytest.mark.slow
def test_two_ranks_train_from_one_cache(s3, tmp_path):
    """What comes from the server are the shards, each once, and in a second run nothing."""
    shards = make_shards(tmp_path, rows=66, valid=9)
    quick = CONFIG.replace("epochs: 10", "epochs: 2").replace("every_epochs: 5", "every_epochs: null")
    config = write_config(tmp_path, shards, quick)
    url = s3.put(shards, "chexpert")
    total = sum(path.stat().st_size for path in shards.glob("train-*.tar"))
    launch_to_end("ddp", ["--config", str(config), "name=local"], tmp_path)
    for name, expected in (("first", total), ("second", 0)):
        arguments = [f"name={name}", f"data.train={url}", f"data.remote.cache_dir={tmp_path}/cache"]
        launch_to_end("ddp", ["--config", str(config), *arguments], tmp_path)
        assert steps(tmp_path / "runs" / name) == steps(tmp_path / "runs" / "local")
        logged = [row for row in rows(tmp_path / "runs" / name) if row.get("event") == "log"][-1]
        assert logged["remote_bytes"] == expected and logged["cache_hits"] > 0


def test_fine_tuning_and_evaluation_read_a_folder_behind_a_url_as_one_on_a_disk(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where the cache is
    images = make_image_folder(tmp_path / "images", per_class=5, splits=("train", "val"))
    build(plan_shards(open_source("image_folder", images), SALT, shard_size=6), tmp_path / "flowers")
    pretrained = make_pretrained(tmp_path / "pretrained")
    url = s3.put(tmp_path / "flowers", "flowers")
    found = []
    for name, shards in (("local", str(tmp_path / "flowers")), ("remote", url)):
        cfg = transfer_config(f"data.shards={shards}", f"model.path={pretrained}", "data.workers=1")
        result = finetune(tmp_path / name, cfg)
        assert result["dataset"] == "flowers"
        scores = evaluate(tmp_path / name, shards=shards, split="valid", resamples=10, workers=1)
        found.append((losses(tmp_path / name), scores["loss"], scores["accuracy"]))
    assert found[0] == found[1]
    with pytest.raises(ValueError, match=r"s3://shards/flowers is not on a disk, .* name the copy"):
        open_sets([url], [])
    with pytest.raises(ValueError, match=r"data.train_split is 'tain' but s3://shards/flowers has only train, valid"):
        open_target(transfer_config(f"data.shards={url}", f"model.path={pretrained}", "data.train_split=tain"))

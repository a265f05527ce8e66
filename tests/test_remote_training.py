"""Acceptance: training from an S3 server that is killed in the middle, and goes on when the server is back."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from helpers_run import launch, launch_to_end, make_shards, rows, steps, write_config

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

"""What a run writes about itself, read back: metrics.jsonl line by line, TensorBoard by its own reader."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers_run import build_single, make_shards, rows, run_single, steps, write_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scaletransfer import labels
from scaletransfer.engine.runlog import METRICS, RunLog, keep_until

TRAINING_TAGS = {
    "train/loss",
    "train/lr",
    "train/grad_norm",
    "train/clipped_units",
    "speed/images_per_second",
    "speed/data_wait",
}


# ---- metrics.jsonl


def write(path: Path, *lines: str) -> None:
    path.write_text("".join(lines))


@pytest.mark.parametrize("half", ["", '{"step": 5, "lo', '{"step": 5', "\0\0\0\0", '{"step": 5, "loss": 0.5}\n{"st'])
def test_rows_behind_the_step_and_a_half_written_line_are_dropped(tmp_path, half):
    path = tmp_path / METRICS
    kept = ['{"step": 1, "loss": 0.5}\n', '{"step": 2}\n', '{"event": "validation", "step": 2}\n']
    write(path, *kept, '{"step": 3}\n', '{"event": "log", "step": 3}\n', half)
    keep_until(path, 2)
    assert path.read_text() == "".join(kept)
    assert list(tmp_path.iterdir()) == [path]


def test_a_half_written_line_of_a_step_that_stays(tmp_path):
    """Killed in the middle of a line: the rows before it stay, the line is dropped, not mended."""
    path = tmp_path / METRICS
    write(path, '{"step": 1}\n', '{"step": 2, "loss": 0.12')
    keep_until(path, 7)
    assert path.read_text() == '{"step": 1}\n'


def test_keeping_until_0_and_where_there_is_no_file(tmp_path):
    keep_until(tmp_path / METRICS, 3)
    assert not list(tmp_path.iterdir())
    write(tmp_path / METRICS, '{"step": 1}\n')
    keep_until(tmp_path / METRICS, 0)
    assert (tmp_path / METRICS).read_text() == ""


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = RunLog(tmp_path, 0, 10, active=False, tensorboard=True)
    log.row({"step": 1})
    log.scalars(1, {"a": 1.0})
    log.advance(1, "loss")
    log.say("hello")
    log.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


# ---- TensorBoard


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every scalar tag, as TensorBoard shows them."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_values_that_are_not_there_make_no_point(tmp_path):
    log = RunLog(tmp_path, 0, 3, active=True, tensorboard=True)
    log.scalars(1, {"a": 1.0, "b": None, "c": math.nan})
    log.scalars(2, {"a": 2.0, "b": 0.5})
    log.close()
    assert points(tmp_path) == {"a": [(1, 1.0), (2, 2.0)], "b": [(2, 0.5)]}


@pytest.mark.parametrize("again_from", [0, 3])
def test_a_killed_and_continued_log_shows_no_step_twice(tmp_path, again_from):
    """Also where the run was killed before its first checkpoint, and starts from 0 again."""
    for start, stop, value in [(0, 5, 1.0), (again_from, 8, 2.0)]:
        log = RunLog(tmp_path, start, 8, active=True, tensorboard=True)
        for step in range(start + 1, stop + 1):
            log.row({"step": step, "value": value})
            log.scalars(step, {"loss": value})
            log.flush()
        if stop == 8:
            log.close()  # the first one is dropped as a killed process leaves it
    expected = [(step, 1.0 if step <= again_from else 2.0) for step in range(1, 9)]
    assert points(tmp_path)["loss"] == expected
    assert [(row["step"], row["value"]) for row in rows(tmp_path)] == expected


# ---- a real run


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """A configuration, and the folder of its run of 2 epochs of 4 steps, validated after each."""
    base = tmp_path_factory.mktemp("runlog")
    config = write_config(base, make_shards(base))
    overrides = ["log.tensorboard=true", "log.every_steps=2", "validate.every_epochs=1", "data.workers=0"]
    run_single(config, "name=whole", "epochs=2", *overrides)
    return config, base / "runs" / "whole"


def test_every_step_has_a_row(made):
    found = steps(made[1])
    assert len(found) == 8
    for number, row in enumerate(found, 1):
        assert row["samples"] == 16 * number
        assert math.isfinite(row["loss"]) and row["loss"] > 0 and row["grad_norm"] > 0
        assert 0 < row["clipped_units"] <= 1
        assert len(row["keys_sha256"]) == 64
    assert len({row["keys_sha256"] for row in found}) == 8
    rates = [row["lr"] for row in found]
    assert rates[0] < rates[3] and rates[4] > rates[7]  # warm-up, then cosine
    assert [row["step"] for row in rows(made[1]) if row.get("event") == "log"] == [1, 2, 4, 6, 8]
    assert [row["step"] for row in rows(made[1]) if row.get("event") == "validation"] == [4, 8]


def test_the_sum_of_keys_is_that_of_the_order(made):
    """Recomputed here from shards and order alone: sha256 of the step's keys by position, one a line."""
    trainer = build_single(made[0], "name=whole", "epochs=2", "data.workers=0")
    index, order = trainer.train.sources[0].index, trainer.train.order
    for number, row in enumerate(steps(made[1])):
        _, lines = order.locate(range(16 * number, 16 * number + 16))
        keys = "\n".join(index.keys("train", lines))
        assert row["keys_sha256"] == hashlib.sha256(keys.encode()).hexdigest()


def test_tensorboard_has_what_the_rows_have(made):
    found = points(made[1])
    assert found.keys() >= TRAINING_TAGS
    by_step = {row["step"]: row for row in steps(made[1])}
    for tag, name in [("loss", "loss"), ("lr", "lr"), ("grad_norm", "grad_norm"), ("clipped_units", "clipped_units")]:
        assert [step for step, _ in found[f"train/{tag}"]] == [1, 2, 4, 6, 8]
        for step, value in found[f"train/{tag}"]:
            assert value == pytest.approx(by_step[step][name], rel=1e-6)
    assert all(value > 0 for _, value in found["speed/images_per_second"])
    assert all(0 <= value <= 1 for _, value in found["speed/data_wait"])


def test_tensorboard_has_the_validation_of_every_finding(made):
    found = points(made[1])
    validations: list[dict[str, Any]] = [row for row in rows(made[1]) if row.get("event") == "validation"]
    for tag, name in [("test/loss", "loss"), ("test/acc", "accuracy"), ("test/mean_auc", "mean_auroc")]:
        expected = [(row["step"], row[name]) for row in validations]
        assert found[tag] == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    defined = 0
    for number, label in enumerate(labels.CHEXPERT_FINDINGS):
        for tag, name in [("AUC_class", "auroc"), ("average_precision_class", "average_precision")]:
            values = [(row["step"], row["classes"][label][name]) for row in validations]
            values = [(step, value) for step, value in values if value is not None]
            assert found.get(f"test/{tag}_{number}", []) == [(s, pytest.approx(v, rel=1e-6)) for s, v in values]
            defined += len(values)
    assert defined > 0


def test_run_folder(made):
    names = {path.name for path in made[1].iterdir()}
    assert names >= {"config.yaml", "environment.json", METRICS, "checkpoints", "best"}
    environment = json.loads((made[1] / "environment.json").read_text())
    assert environment["engine"] == "single" and environment["packages"]["torch"]
    assert (made[1] / "checkpoints" / "latest").read_text() == "step-00000008\n"


def test_a_resumed_run_shows_no_step_twice_and_equals_the_whole_one(made):
    """As a kill after step 6 would leave it: the checkpoint of step 4, and rows and points behind it."""
    config, whole = made
    again = whole.with_name("again")
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step-00000008")
    with (again / METRICS).open("r+") as handle:
        kept = [line for line in handle.read().splitlines(keepends=True) if json.loads(line)["step"] <= 6]
        handle.seek(0)
        handle.truncate()
        handle.write("".join(kept) + '{"step": 7, "lo')
    overrides = ["log.tensorboard=true", "log.every_steps=2", "validate.every_epochs=1", "data.workers=0"]
    run_single(config, "name=again", "epochs=2", *overrides)
    for one, two in zip(steps(whole), steps(again), strict=True):
        assert one == two
    before, after = points(whole), points(again)
    for tag in before:
        if not tag.startswith("speed/"):
            # a resumed run reports its own first step, 5, too
            assert [p for p in after[tag] if p[0] != 5] == before[tag], tag
    assert [step for step, _ in after["train/loss"]] == [1, 2, 4, 5, 6, 8]
    assert [row["step"] for row in rows(again) if row.get("event") == "validation"] == [4, 8]

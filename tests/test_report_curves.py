"""Learning curves, read from what our own run log writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_report import write_run

from scaletransfer.engine.runlog import RunLog
from scaletransfer.report_curves import LOSS, POINTS, curves_of, read_run_curves
from scaletransfer.report_inputs import read_inputs


def log_of(folder: Path, points: dict[int, dict[str, float]], start: int = 0) -> None:
    log = RunLog(folder, start, 100, active=True, tensorboard=True)
    for step, values in points.items():
        log.scalars(step, values)
    log.close()


def test_events_of_a_run_that_was_resumed_count_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 0.5, curve={50: 0.9})  # the events come first
    log_of(folder, {10: {"train/loss": 2.0}, 20: {"train/loss": 1.0, "test/acc": 0.25, "test/mean_auc": 0.5}})
    log_of(folder, {20: {"train/loss": 1.5, "test/acc": 0.75}, 30: {"speed/images_per_second": 5.0}}, start=10)
    curves = read_run_curves(folder)
    assert curves[LOSS] == {10: 2.0, 20: 1.5} and curves["accuracy"] == {20: 75.0}
    assert "speed/images_per_second" not in curves


def test_events_that_a_kill_cut_short_are_read_as_far_as_they_go(tmp_path: Path, capfd) -> None:
    folder = write_run(tmp_path / "run", 0.5)
    log_of(folder, {step: {"test/acc": 0.5} for step in (10, 20, 30)})
    (path,) = folder.glob("events.*")
    capfd.readouterr()  # the run's progress bar
    path.write_bytes(path.read_bytes()[:-7])
    assert read_run_curves(folder)["accuracy"] == {10: 50.0, 20: 50.0}
    path.write_bytes(b"no events at all")
    assert read_run_curves(folder) == {}
    assert capfd.readouterr().err == ""


def test_without_events_there_are_the_rows(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 0.5, curve={0: 0.2, 100: 0.5})
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"event": "validation", "step": 300, "accu')  # killed while it wrote
    assert read_run_curves(folder) == {"accuracy": {0: 20.0, 100: 50.0}, "loss": {0: 1.0, 100: 1.0}, LOSS: {1: 2.0}}
    assert read_run_curves(tmp_path / "nowhere") == {}


def test_a_model_has_the_steps_that_all_its_seeds_have(tmp_path: Path) -> None:
    for seed, shift in enumerate((0.0, 0.2)):
        folder = write_run(tmp_path / f"s{seed}", 0.5, seed=seed)
        points = {step: {"test/acc": 0.001 * step + shift, "train/loss": 1.0} for step in range(1, 401)}
        log_of(folder, points | {500 + seed: {"test/acc": 0.9}})
    accuracy, loss = curves_of(read_inputs([tmp_path]).entries)
    assert (accuracy.metric, accuracy.seeds, accuracy.shot, loss.metric) == ("accuracy", 2, 5, LOSS)
    assert (
        len(accuracy.steps) <= POINTS and accuracy.steps[-1] == 400 and len(set(accuracy.steps)) == len(accuracy.steps)
    )
    assert (accuracy.mean[-1], accuracy.low[-1], accuracy.high[-1]) == pytest.approx((50.0, 40.0, 60.0), rel=1e-6)

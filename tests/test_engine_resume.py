"""Acceptance: `kill -9` of a rank, the same command again, and every number is that of the run that was not killed."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers_run import Launched, launch, launch_to_end, make_shards, rows, run_single, steps, write_config

from scaletransfer.engine import checkpoint as checkpoints
from scaletransfer.engine.checkpoint import find_latest, open_checkpoint
from scaletransfer.export_model import main as export

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

CONFIG = """\
seed: 3
epochs: 3
global_batch: 32
micro_batch: 8
precision: fp32
model: {name: BiT-tiny}
data: {image_size: 32, workers: 1, augment_protocol: corrected}
optimizer: {name: sgd_agc, base_lr: 0.05, clipping: 0.02}
schedule: {kind: cosine, warmup_epochs: 0.5}
checkpoint: {every_steps: 3, every_minutes: null, keep: 100}
log: {every_steps: 1, tensorboard: false}
validate: {every_epochs: 2, batch: 8}
"""
STEPS_AN_EPOCH = 4
STEPS = 3 * STEPS_AN_EPOCH
FIRST_HARM = 7  # a run that was killed in its second checkpoint starts again from step 3 and must pass 6
ENDS_WITHIN = 60  # seconds, from the kill to the end of the launcher


@dataclass
class Bench:
    """Shards, a configuration (2 ranks x 8 images x 2 micro-batches), and the uninterrupted run of each engine."""

    folder: Path
    config: Path

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def arguments(self, name: str, *overrides: str) -> list[str]:
        return ["--config", str(self.config), f"name={name}", *overrides]

    def start(self, engine: str, name: str, *overrides: str) -> Launched:
        return launch(engine, self.arguments(name, *overrides), self.folder)

    def finish(self, engine: str, name: str, *overrides: str) -> Launched:
        return launch_to_end(engine, self.arguments(name, *overrides), self.folder)

    def whole(self, engine: str) -> Path:
        """The run folder of the uninterrupted run, made at the first call."""
        if not self.run(f"whole-{engine}").exists():
            self.finish(engine, f"whole-{engine}")
        return self.run(f"whole-{engine}")


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    folder = tmp_path_factory.mktemp("resume")
    shards = make_shards(folder, rows=STEPS_AN_EPOCH * 32 + 5, shard_size=40)
    return Bench(folder, write_config(folder, shards, CONFIG))


def weights(run: Path, to: Path) -> str:
    """sha256 of the exported network."""
    assert export([str(run), "--to", str(to)]) == 0
    return hashlib.sha256((to / "model.safetensors").read_bytes()).hexdigest()


def done(folder: Path) -> int:
    """The last step in metrics.jsonl; 0 where there is none yet."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    found = re.findall(r'^{"step": (\d+)', text, flags=re.MULTILINE)
    return int(found[-1]) if found else 0


def wait_for_step(run: Launched, folder: Path, step: int) -> None:
    while done(folder) < step:
        assert run.process.poll() is None, run.text()
        time.sleep(0.005)


def kill(run: Launched, victim: int) -> None:
    """SIGKILL one rank, which must be training: the launcher ends in time, not well, and nobody is left."""
    process = run.ranks(2)[victim]
    assert run.process.poll() is None, run.text()
    os.kill(process, signal.SIGKILL)
    began = time.monotonic()
    try:
        status = run.wait(ENDS_WITHIN)
        print(f"rank {victim} killed; the launcher ended after {time.monotonic() - began:.1f} s with {status}")
        left = run.survivors()
        while left and time.monotonic() - began < ENDS_WITHIN:  # loader processes look every 5 s if their parent lives
            time.sleep(0.2)
            left = run.survivors()
    finally:
        run.end()
    assert status != 0, run.text()
    assert not left


def same(run: Path, whole: Path, folder: Path) -> None:
    """Keys, losses, everything else of every step, the validations and the weights: equal to the last bit."""
    found, expected = steps(run), steps(whole)
    assert len(found) == len(expected) == STEPS
    for one, two in zip(found, expected, strict=True):
        assert one == two
    validations = [[row for row in rows(path) if row.get("event") == "validation"] for path in (run, whole)]
    assert validations[0] == validations[1] and [row["step"] for row in validations[0]] == [8, 12]
    exports = folder / f"exports-{run.name}"
    assert weights(run, exports / "a") == weights(whole, exports / "b")


def killed_at_random(bench: Bench, engine: str, name: str, seed: int, first: int = STEPS_AN_EPOCH + 1) -> None:
    """Start a run and kill it: a rank and a moment drawn from the seed, from step `first` on (epoch 2 or later)."""
    draw = random.Random(f"{engine}/{seed}")
    victim, step, part = draw.randrange(2), draw.randint(first, STEPS - 3), draw.random()
    run = bench.start(engine, name)
    try:
        wait_for_step(run, bench.run(name), step - 1)
        began = time.monotonic()
        wait_for_step(run, bench.run(name), step)
        delay = part * min(0.5, time.monotonic() - began)  # after a validation the first step takes much longer
        time.sleep(delay)
        print(f"{engine}, seed {seed}: rank {victim} is killed {delay:.3f} s after step {step}")
        kill(run, victim)
    finally:
        run.end()
    assert STEPS_AN_EPOCH < done(bench.run(name)) < STEPS


def resumed(bench: Bench, engine: str, name: str) -> None:
    """The same command again goes on from the newest complete checkpoint, to the numbers of the uninterrupted run."""
    latest = find_latest(bench.run(name) / "checkpoints")
    assert latest is not None
    start = open_checkpoint(latest).step
    assert 0 < start < STEPS
    again = bench.finish(engine, name)
    assert f"from {latest} (step {start}) to step {STEPS}" in again.out.read_text(), again.text()
    same(bench.run(name), bench.whole(engine), bench.folder)


def until_step_3(bench: Bench, engine: str, name: str) -> Path:
    """A copy of the uninterrupted run whose newest checkpoint is that of step 3; its folder."""
    shutil.copytree(bench.whole(engine), bench.run(name))
    for path in (bench.run(name) / "checkpoints").glob("step-*"):
        if open_checkpoint(path).step > 3:
            shutil.rmtree(path)
    return bench.run(name)


def killed_while_saving(bench: Bench, engine: str, name: str) -> None:
    """Kill a run that hangs in the middle of its second checkpoint, everything written but the marker."""
    run = launch(engine, ["6", *bench.arguments(name)], bench.folder, module="workers_resume.slow_save")
    try:
        root = bench.run(name) / "checkpoints"
        while not list(root.glob(".step-00000006.*/manifest.json")):
            assert run.process.poll() is None, run.text()
            time.sleep(0.01)
        kill(run, 1)
    finally:
        run.end()
    assert list(root.glob(".step-00000006.*/manifest.json")) and not list(root.glob(".step-00000006.*/COMPLETE"))
    assert find_latest(bench.run(name) / "checkpoints") == bench.run(name) / "checkpoints" / "step-00000003"
    assert (bench.run(name) / "checkpoints" / "latest").read_text() == "step-00000003\n"


@pytest.mark.slow
def test_fsdp2_killed_and_the_same_command_again(bench):
    killed_at_random(bench, "fsdp2", "killed-fsdp2", seed=0)
    resumed(bench, "fsdp2", "killed-fsdp2")


def test_zero2_killed_while_saving_and_again_at_random(bench):
    """Twice interrupted: in the checkpoint of step 6, which must not be used, and later at a random moment."""
    killed_while_saving(bench, "zero2", "killed-zero2")
    killed_at_random(bench, "zero2", "killed-zero2", seed=0, first=FIRST_HARM)
    assert not list((bench.run("killed-zero2") / "checkpoints").glob(".step-00000006*"))
    resumed(bench, "zero2", "killed-zero2")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("engine", ["zero2", "fsdp2"])
def test_killed_at_many_moments(bench, engine, seed):
    killed_at_random(bench, engine, f"killed-{engine}-{seed}", seed)
    resumed(bench, engine, f"killed-{engine}-{seed}")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero1", "zero3", "ddp"])
def test_the_other_engines_killed_while_saving(bench, engine):
    killed_while_saving(bench, engine, f"saving-{engine}")
    resumed(bench, engine, f"saving-{engine}")


def test_a_run_goes_on_under_another_engine_and_number_of_ranks(bench):
    """zero2 on 2 ranks, then fsdp2 on 2, then one process: the losses of zero2 throughout."""
    whole, moved = bench.whole("zero2"), until_step_3(bench, "zero2", "moved")
    second = bench.finish("fsdp2", "moved", "max_steps=7")
    assert "fsdp2 on 2 ranks: training from" in second.out.read_text() and "(step 3)" in second.out.read_text()
    assert open_checkpoint(moved / "checkpoints" / "step-00000007").manifest["engine"] == "fsdp2"
    trainer = run_single(bench.config, "name=moved", "data.workers=0")
    assert (trainer.start, trainer.engine.world, trainer.engine.accumulation) == (7, 1, 4)
    found, expected = steps(moved), steps(whole)
    assert len(found) == len(expected) == STEPS
    for one, two in zip(found, expected, strict=True):
        assert one["keys_sha256"] == two["keys_sha256"]
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_disk_that_is_full_for_one_rank(bench, victim):
    """The run ends with a sentence that says what and where, and what was saved before stays."""
    name = f"full-{victim}"
    worker = {"module": "workers_resume.full_disk"}
    run = launch("ddp", [str(victim), "6", *bench.arguments(name)], bench.folder, **worker)
    try:
        assert run.wait() != 0
    finally:
        run.end()
    said = [line for line in re.split(r"[\r\n]", run.err.read_text()) if line.startswith("error: ")]
    assert said and all("No space left on device" in line and "rank-0000" in line for line in said), run.text()
    assert any(f"rank-0000{victim}.safetensors" in line for line in said) and "Traceback" not in said[0]
    root = bench.run(name) / "checkpoints"
    assert find_latest(root) == root / "step-00000003" and (root / "latest").read_text() == "step-00000003\n"
    assert done(bench.run(name)) < STEPS
    bench.finish("ddp", name)
    same(bench.run(name), bench.whole("ddp"), bench.folder)


@pytest.mark.slow
def test_a_run_on_a_full_disk_may_go_on(bench):
    """It says so at every checkpoint that it cannot write, and does not end well without its last."""
    overrides = ["checkpoint.on_failure=continue", "max_steps=9"]
    arguments = ["1", "6", *bench.arguments("full-on", *overrides)]
    run = launch("ddp", arguments, bench.folder, module="workers_resume.full_disk")
    try:
        assert run.wait() != 0
    finally:
        run.end()
    assert done(bench.run("full-on")) == 9
    words = "checkpoint of step 6 was not written, training goes on with the ones before it: rank 1 could not write"
    assert words in run.text() + (bench.run("full-on") / "log.txt").read_text()
    assert find_latest(bench.run("full-on") / "checkpoints") == bench.run("full-on") / "checkpoints" / "step-00000003"


CHAINS = {
    "zero3 on 4, fsdp2 on 2, ddp on 3": [("zero3", 4, 3), ("fsdp2", 2, 6), ("ddp", 3, STEPS)],
    "ddp on 3, zero1 on 2, fsdp2 on 4": [("ddp", 3, 2), ("zero1", 2, 5), ("fsdp2", 4, STEPS)],
    "zero2 on 2, zero3 on 3, zero2 on 4": [("zero2", 2, 3), ("zero3", 3, 7), ("zero2", 4, STEPS)],
}
"""Stages (engine, ranks, step at which it ends); every change falls into the middle of an epoch."""


@pytest.mark.slow
@pytest.mark.parametrize("stages", CHAINS.values(), ids=CHAINS)
def test_engine_and_number_of_ranks_change_in_the_middle_of_an_epoch(tmp_path, stages):
    """Every sample still once an epoch, and the losses of the uninterrupted run on one process."""
    shards = make_shards(tmp_path, rows=STEPS_AN_EPOCH * 24 + 5, shard_size=40)
    text = CONFIG.replace("global_batch: 32", "global_batch: 24").replace("micro_batch: 8", "micro_batch: 2", 1)
    text = text.replace("every_steps: 3", "every_steps: 100").replace("image_size: 32", "image_size: 16")
    config = write_config(tmp_path, shards, text.replace("validate: {every_epochs: 2", "validate: {every_epochs: null"))
    for engine, world, end in stages:
        assert end % STEPS_AN_EPOCH or end == STEPS
        arguments = ["--config", str(config), "name=moved", f"max_steps={end}"]
        arguments.append(f"checkpoint.asynchronous={str(world != 2).lower()}")
        run = launch_to_end(engine, arguments, tmp_path, world=world, limit=600)
        assert f"{engine} on {world} ranks" in run.out.read_text()
    moved = tmp_path / "runs" / "moved"
    whole = run_single(config, "name=whole", "data.workers=0", "micro_batch=24")
    found, expected = steps(moved), steps(whole.folder)
    assert len(found) == len(expected) == STEPS
    for one, two in zip(found, expected, strict=True):
        assert one["keys_sha256"] == two["keys_sha256"] and one["lr"] == two["lr"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["clipped_units"] == pytest.approx(two["clipped_units"], abs=1e-3)


def test_without_its_momentum_a_run_would_not_go_on_as_it_was(bench, monkeypatch):
    """The comparison above can fail: what is lost with the momentum is a thousand times its tolerance."""
    until_step_3(bench, "zero2", "forgetful")
    monkeypatch.setattr(checkpoints, "load_momentum", lambda engine, found: None)
    run_single(bench.config, "name=forgetful", "data.workers=0", "max_steps=7")
    found, expected = steps(bench.run("forgetful")), steps(bench.whole("zero2"))
    assert abs(found[6]["loss"] - expected[6]["loss"]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "fsdp2"])
def test_a_loss_that_is_not_finite_stops_all_ranks(bench, engine):
    overrides = ["optimizer.name=sgd", "optimizer.base_lr=1e30", "schedule.warmup_epochs=0", "checkpoint.every_steps=1"]
    run = bench.start(engine, f"diverged-{engine}", *overrides)
    try:
        assert run.wait() != 0
        assert "training has diverged" in run.error()
    finally:
        run.end()
    stop = rows(bench.run(f"diverged-{engine}"))[-1]
    latest = find_latest(bench.run(f"diverged-{engine}") / "checkpoints")
    assert stop["event"] == "not finite" and (latest is None or open_checkpoint(latest).step < stop["step"])

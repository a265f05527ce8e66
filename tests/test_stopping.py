"""A signal to one rank: all finish the step, save the same one, leave a marker and end with 75; nothing is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_run import Launched, build_single, launch, launch_to_end, make_shards, rows, steps, write_config

from scaletransfer.cli import Stopped
from scaletransfer.engine.checkpoint import find_latest, open_checkpoint
from scaletransfer.engine.marks import PROCESSES, REQUEUE

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

CONFIG = """\
seed: 3
epochs: 3
global_batch: 16
micro_batch: 4
precision: fp32
model: {name: BiT-tiny}
data: {image_size: 32, workers: 1, augment_protocol: corrected}
optimizer: {name: sgd_agc, base_lr: 0.05, clipping: 0.02}
schedule: {kind: cosine, warmup_epochs: 0.5}
checkpoint: {every_steps: 100, every_minutes: null, keep: 100}
log: {every_steps: 3, tensorboard: false}
validate: {every_epochs: 2, batch: 1}
"""
STEPS = 12  # of 2 ranks x 4 images x 2 micro-batches; validation after step 8, of 20 batches a rank or more


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = write_config(folder, make_shards(folder, rows=67, valid=80, shard_size=30), CONFIG)

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def start(self, engine: str | None, name: str, case: object, *overrides: str, world: int = 2) -> Launched:
        arguments = [json.dumps(case), "--config", str(self.config), f"name={name}", *overrides]
        return launch(engine, arguments, self.folder, module="workers_stopping.acting", world=world)

    def stopped(self, engine: str | None, name: str, case: object, *overrides: str, world: int = 2) -> int:
        """Start a run that is stopped by the case: the step that it saved."""
        run = self.start(engine, name, case, *overrides, world=world)
        try:
            status = run.wait()
        finally:
            run.end()
        text = run.err.read_text()
        assert status == (75 if engine is None else 1), run.text()
        assert "stopped: after step" in text and "error: " not in text.replace("ChildFailedError: ", ""), run.text()
        if engine is not None:
            assert "exitcode  : 75" in text, run.text()
        found = json.loads((self.run(name) / REQUEUE).read_text())
        assert not (self.run(name) / PROCESSES).exists()
        latest = find_latest(self.run(name) / "checkpoints")
        assert latest is not None and open_checkpoint(latest).step == found["step"]
        assert rows(self.run(name))[-1]["step"] == found["step"], "the log goes as far as the checkpoint"
        assert not run.survivors()
        return int(found["step"])


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("stopping"))


def same(run: Path, whole: Path) -> None:
    """Every step and validation once, equal to the last bit."""
    assert [{**row} for row in steps(run)] == steps(whole) and len(steps(run)) == STEPS
    validations = [[row for row in rows(path) if row.get("event") == "validation"] for path in (run, whole)]
    assert validations[0] == validations[1] and [row["step"] for row in validations[0]] == [8, 12]


def stopped_again_and_again(bench: Bench, engine: str, world: int = 2) -> None:
    name, whole = f"stopped-{engine}", f"whole-{engine}"
    micro = f"micro_batch={8 // world}"  # two micro-batches a step
    launch_to_end(engine, ["--config", str(bench.config), f"name={whole}", micro], bench.folder, world=world)
    assert not (bench.run(whole) / REQUEUE).exists() and not (bench.run(whole) / PROCESSES).exists()
    # between the two micro-batches of step 3: after the small all-reduce of that step, so that step 4 is the last
    assert bench.stopped(engine, name, {"rank": 1, "at": "step", "number": 6, "do": "SIGUSR1"}, micro, world=world) == 4
    # while the data of step 6 is waited for
    assert bench.stopped(engine, name, {"rank": 0, "at": "data", "number": 6, "do": "SIGTERM"}, micro, world=world) == 6
    # in the third batch of the validation after step 8: given up, the step is saved
    assert (
        bench.stopped(engine, name, {"rank": 1, "at": "validation", "number": 2, "do": "SIGUSR1"}, micro, world=world)
        == 8
    )
    assert not [row for row in rows(bench.run(name)) if row.get("event") == "validation"]
    again = launch_to_end(engine, ["--config", str(bench.config), f"name={name}", micro], bench.folder, world=world)
    assert "(step 8)" in again.out.read_text()
    assert not (bench.run(name) / REQUEUE).exists()
    same(bench.run(name), bench.run(whole))


def test_ddp_stopped_in_a_step_for_data_and_in_validation(bench):
    stopped_again_and_again(bench, "ddp")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "world"),
    [("fsdp2", 2), ("hsdp", 4), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("zero3_offload", 2)],
)
def test_sharding_engines_stopped_in_a_step_for_data_and_in_validation(bench, engine, world):
    stopped_again_and_again(bench, engine, world)


def test_one_process_is_stopped_with_75_and_says_who_it_is(bench):
    case = {"rank": 0, "at": "data", "number": 3, "do": "SIGTERM"}
    assert bench.stopped(None, "alone", case, "micro_batch=16", world=1) == 3
    shutil.rmtree(bench.run("alone"))


def test_the_last_validation_is_owed_when_it_was_given_up(bench):
    options = ("name=owed", "micro_batch=16", "max_steps=4", "data.workers=0")
    trainer = build_single(bench.config, *options)
    load, seen = trainer.valid.__getitems__, []

    def load_and_ask(positions):
        seen.append(positions)
        if len(seen) == 3:
            trainer.guard.stopping.ask("a signal")
        return load(positions)

    trainer.valid.__getitems__ = load_and_ask
    with pytest.raises(Stopped, match="after step 4 of 4"):
        trainer.run()
    assert len(seen) < 40
    again = build_single(bench.config, *options)
    assert again.start == 4 and not again.complete()
    again.run()
    assert [row["step"] for row in rows(bench.run("owed")) if row.get("event") == "validation"] == [4]
    assert build_single(bench.config, *options).complete()


def test_a_second_signal_ends_at_once(bench):
    hang = {"rank": 0, "at": "data", "number": 3, "do": "hang"}
    run = bench.start(None, "twice", hang, "micro_batch=16", world=1)
    try:
        while "acting: hang" not in run.err.read_text():
            assert run.process.poll() is None, run.text()
        processes = (bench.run("twice") / PROCESSES).read_text()
        assert re.fullmatch(rf"0 \S+ {run.process.pid}\n", processes)
        run.process.terminate()
        with pytest.raises(Exception, match="timed out"):
            run.wait(6)
        run.process.terminate()
        assert run.wait(30) == 128 + 15
        assert "got SIGTERM again: it ends at once" in run.err.read_text()
        assert not (bench.run("twice") / REQUEUE).exists()
    finally:
        run.end()


FORKED = """
import os, signal, time
from scaletransfer.engine.stopping import Stopping
stopping = Stopping()
stopping.install()
child = os.fork()
if not child:
    time.sleep(60)
    os._exit(0)
time.sleep(0.5)
os.kill(child, signal.SIGUSR1)
time.sleep(0.5)
assert os.waitpid(child, os.WNOHANG) == (0, 0), "a loader process ignores what is meant for its parent"
os.kill(child, signal.SIGTERM)
_, status = os.waitpid(child, 0)
assert os.WTERMSIG(status) == signal.SIGTERM
time.sleep(0.5)
assert not stopping.asked, "its signals are not ours"
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(0.5)
assert stopping.asked == "SIGUSR1"
stopping.uninstall()
assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
"""


def test_signals_to_a_forked_loader_process_are_its_own():
    done = subprocess.run(
        [sys.executable, "-c", FORKED],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr

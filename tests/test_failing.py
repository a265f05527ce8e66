"""A rank that dies, hangs or fails ends the run on all ranks in the configured time, with a sentence that names it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from helpers_run import Launched, launch, make_shards, write_config

from scaletransfer.engine.marks import FAILED, PROCESSES
from scaletransfer.engine.runlog import METRICS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

CONFIG = """\
seed: 3
epochs: 500
global_batch: 24
micro_batch: 4
precision: fp32
model: {name: BiT-tiny}
data: {image_size: 32, workers: 1, augment_protocol: corrected}
optimizer: {name: sgd_agc, base_lr: 0.05, clipping: 0.02}
schedule: {kind: cosine, warmup_epochs: 0.5}
checkpoint: {every_steps: 100, every_minutes: null}
log: {every_steps: 1, tensorboard: false}
validate: {every_epochs: null}
failing: {timeout_minutes: 0.5}
"""
LIMIT = 30.0  # seconds that the configuration allows; beyond it a loaded machine gets some more
PATIENCE = 60.0
HOST = socket.gethostname()


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = write_config(folder, make_shards(folder, rows=67, valid=4, shard_size=30), CONFIG)

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def start(self, engine: str, name: str, case: object | None = None, *, world: int = 2) -> Launched:
        micro = 3 if world == 4 else 4
        arguments = [json.dumps(case or []), "--config", str(self.config), f"name={name}", f"micro_batch={micro}"]
        return launch(engine, arguments, self.folder, module="workers_stopping.acting", world=world)

    def until_step(self, run: Launched, name: str, step: int) -> None:
        path = self.run(name) / METRICS
        while not (path.exists() and f'{{"step": {step},' in path.read_text()):
            assert run.process.poll() is None, run.text()
            time.sleep(0.05)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("failing"))


def ended(run: Launched, began: float, seconds: float) -> str:
    """The one sentence with which the run ended in time, nothing left of it."""
    status = run.wait(seconds + PATIENCE)
    took = time.monotonic() - began
    text = run.err.read_text()
    print(f"ended after {took:.1f} s with {status}:\n{text[-3500:]}")
    assert status != 0
    found = [line for line in re.split(r"[\r\n]", text) if line.startswith("error: ")]
    assert len(found) == 1, run.text()
    assert "Traceback" not in text[: text.index(found[0])], "something was printed before it"
    # behind it comes the launcher alone: its traceback, and its own summary
    behind = text[text.index(found[0]) + len(found[0]) :]
    assert behind.count("Traceback (most recent call last)") <= 1, run.text()
    end = time.monotonic() + 15  # loader processes look every 5 s if their parent lives
    while run.survivors() and time.monotonic() < end:
        time.sleep(0.2)
    assert not run.survivors()
    return found[0].removeprefix("error: ")


def hit(bench: Bench, engine: str, number: signal.Signals, world: int) -> str:
    """Signal the last rank of a run that trains; the sentence with which all end."""
    name = f"{number.name.lower()}-{engine}-{world}"
    run = bench.start(engine, name, world=world)
    try:
        bench.until_step(run, name, 2)
        victim = run.ranks(world)[world - 1]
        lines = (bench.run(name) / PROCESSES).read_text().splitlines()
        assert lines[world - 1] == f"{world - 1} {HOST} {victim}" and len(lines) == world
        os.kill(victim, number)
        sentence = ended(run, time.monotonic(), LIMIT)
        assert sentence.startswith(f"rank {world - 1} on {HOST} (process {victim}) "), sentence
        assert (bench.run(name) / FAILED).read_text() == sentence + "\n"
        return sentence
    finally:
        run.end()


def test_a_rank_that_is_killed_is_named(bench):
    assert " is gone: it was killed" in hit(bench, "ddp", signal.SIGKILL, 2)


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named(bench):
    assert " has said nothing for " in hit(bench, "ddp", signal.SIGSTOP, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "world"),
    [("ddp", 3), ("fsdp2", 3), ("hsdp", 4), ("zero1", 3), ("zero2", 3), ("zero3", 3), ("zero3_offload", 3)],
)
def test_of_several_ranks_the_one_that_is_killed_or_stopped_is_named(bench, engine, world):
    assert " is gone: it was killed" in hit(bench, engine, signal.SIGKILL, world)
    assert " has said nothing for " in hit(bench, engine, signal.SIGSTOP, world)


def acted(bench: Bench, name: str, case: dict[str, object], seconds: float) -> tuple[str, str]:
    """The sentence of a run in which rank 1 does something, and all of its stderr."""
    run = bench.start("ddp", name, {"rank": 1, **case})
    try:
        while "acting: " not in run.err.read_text():
            assert run.process.poll() is None, run.text()
            time.sleep(0.05)
        return ended(run, time.monotonic(), seconds), run.err.read_text()
    finally:
        run.end()


def test_a_data_error_of_one_rank_ends_all_in_a_few_seconds(bench):
    case = {"at": "data", "number": 3, "do": "error"}
    began = time.monotonic()
    sentence, text = acted(bench, "error", case, 6)
    assert re.fullmatch(rf"\[rank 1 on {HOST} \(process \d+\)\] this image cannot be read", sentence)
    assert f"traceback : error: {sentence}" in text or f"traceback : {sentence}" in text or "exitcode" not in text, text
    assert time.monotonic() - began < 6 + PATIENCE


@pytest.mark.slow
def test_a_rank_that_hangs_waiting_for_data_is_named(bench):
    sentence, _ = acted(bench, "hang", {"at": "data", "number": 3, "do": "hang"}, LIMIT)
    assert re.search(rf"no rank has got on .*rank 1 on {HOST} \(process \d+\) is waiting for data \(step 3\)", sentence)


@pytest.mark.slow
def test_a_defect_of_one_rank_shows_its_traceback_and_one_sentence(bench):
    run = bench.start("ddp", "defect", {"rank": 1, "at": "data", "number": 3, "do": "defect"})
    try:
        assert run.wait() != 0
        text = run.err.read_text()
        found = re.findall(r"^error: .*", text, flags=re.MULTILINE)
        assert len(found) == 1 and "failed: KeyError: 'no such thing'; its traceback stands above" in found[0], text
        assert text.index("act(case)") < text.index(found[0])
    finally:
        run.end()


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_a_checkpoint_and_nobody(bench):
    run = bench.start("ddp", "orphans")
    try:
        bench.until_step(run, "orphans", 2)
        os.kill(run.process.pid, signal.SIGUSR1)
        run.wait()
        end = time.monotonic() + PATIENCE
        while run.survivors() and time.monotonic() < end:
            time.sleep(0.2)
        assert not run.survivors()
        assert (bench.run("orphans") / "requeue").exists(), run.text()
    finally:
        run.end()

"""launch/hosts.sh over two hosts that are network namespaces: they train, stop, lose their link, and go on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from helpers_netns import Hosts, netns_is_missing, two_hosts
from helpers_run import MARK, Launched, launch_to_end, make_shards, rows, steps, write_config

from scaletransfer.engine.marks import PROCESSES, REQUEUE

REPOSITORY = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(netns_is_missing()), reason=netns_is_missing() or "namespaces are there"),
]

CONFIG = """\
seed: 3
epochs: 40
global_batch: 16
micro_batch: 4
precision: fp32
model: {name: BiT-tiny}
data: {image_size: 32, workers: 1, augment_protocol: corrected}
optimizer: {name: sgd_agc, base_lr: 0.05, clipping: 0.02}
schedule: {kind: cosine, warmup_epochs: 0.5}
checkpoint: {every_steps: 5, every_minutes: null}
log: {every_steps: 1, tensorboard: false}
validate: {every_epochs: null}
failing: {timeout_minutes: 0.5}
"""
LIMIT, PATIENCE = 30.0, 60.0


class Cluster:
    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.config = write_config(folder, make_shards(folder, rows=67, valid=4, shard_size=30), CONFIG)
        self.file = folder / "hosts"
        lines = [f"{name} {address}" for name, address in zip(hosts.names, hosts.addresses, strict=True)]
        self.file.write_text("# two hosts\n" + "\n".join(lines) + "\n")
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        command = bin_folder / "python"
        command.write_text(f'#!/bin/sh\nPYTHONPATH={REPOSITORY} OMP_NUM_THREADS=1 exec {sys.executable} "$@"\n')
        command.chmod(0o755)
        self.path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def start(self, engine: str, name: str, *overrides: str) -> Launched:
        mark = uuid.uuid4().hex
        out, err = self.folder / f"{mark}.out", self.folder / f"{mark}.err"
        environment = {**os.environ, MARK: mark, "PATH": self.path, "REMOTE": str(self.hosts.remote), "GRACE": "20"}
        words = ["bash", str(REPOSITORY / "launch" / "hosts.sh"), str(self.file), engine]
        words += ["--config", str(self.config), f"name={name}", *overrides]
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                words, cwd=self.folder, env=environment, stdout=stdout, stderr=stderr, start_new_session=True
            )
        return Launched(process, mark, out, err)

    def until_step(self, run: Launched, name: str, step: int) -> int:
        """Wait until the run has logged a step; the newest."""
        path = self.run(name) / "metrics.jsonl"
        while True:
            text = path.read_text() if path.exists() else ""
            found = re.findall(r'^{"step": (\d+)', text, flags=re.MULTILINE)
            if found and int(found[-1]) >= step:
                return int(found[-1])
            assert run.process.poll() is None, run.text()
            time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("hosts")
    with two_hosts(folder) as hosts:
        yield Cluster(hosts, folder)


def test_two_hosts_are_stopped_and_go_on(cluster):
    run = cluster.start("ddp", "stopped", "epochs=5", "checkpoint.every_steps=100")
    try:
        before = cluster.until_step(run, "stopped", 3)
        processes = (cluster.run("stopped") / PROCESSES).read_text()
        first, second = cluster.hosts.names
        assert re.fullmatch(rf"0 {first} \d+\n1 {second} \d+\n", processes), processes
        run.process.send_signal(signal.SIGINT)
        assert run.wait() == 75, run.text()
    finally:
        run.end()
    assert (cluster.run("stopped") / REQUEUE).exists() and rows(cluster.run("stopped"))[-1]["step"] >= before
    again = cluster.start("ddp", "stopped", "epochs=5", "checkpoint.every_steps=100")
    try:
        assert again.wait() == 0, again.text()
    finally:
        again.end()
    launch_to_end("ddp", ["--config", str(cluster.config), "name=whole", "epochs=5"], cluster.folder)
    assert steps(cluster.run("stopped")) == steps(cluster.run("whole"))


@pytest.mark.parametrize("how", ["link", "drop"])
@pytest.mark.parametrize("engine", ["ddp", "zero2", "fsdp2"])
def test_a_link_that_is_interrupted_ends_both_in_time_and_the_run_goes_on(cluster, engine, how):
    """The cable is pulled out, or packets are lost without a word."""
    name = f"cut-{engine}-{how}"
    hosts = cluster.hosts
    cut, mend = {
        "link": (partial(hosts.link, "down"), partial(hosts.link, "up")),
        "drop": (partial(hosts.drop, True), partial(hosts.drop, False)),
    }[how]
    run = cluster.start(engine, name)
    try:
        cluster.until_step(run, name, 6)
        began = time.monotonic()
        cut()
        status = run.wait(LIMIT + PATIENCE)
        took = time.monotonic() - began
    finally:
        mend()
        run.end()
    text = run.err.read_text()
    print(f"ended after {took:.1f} s with {status}:\n{text[-4000:]}")
    assert status == 1, run.text()
    said = [line for line in text.splitlines() if line.startswith("error: ")]
    second = cluster.hosts.names[1]
    there = rf"error: rank 1 on {second} \(process \d+\) has said nothing for .* the network to it is"
    here = rf"error: rank 1 on {second} \(process \d+\) has heard nothing from the launcher of rank 0 at 10\.231\.77\.1"
    assert any(re.match(there, line) for line in said), run.text()
    assert any(re.match(here, line) for line in said), run.text()
    assert text.strip().splitlines()[-1].startswith("error: rank 1 on"), "the sentence is the last line"
    newest = rows(cluster.run(name))[-1]["step"]
    again = cluster.start(engine, name, f"max_steps={newest + 3}")
    try:
        assert again.wait() == 0, again.text()
    finally:
        again.end()
    assert re.search(r"training from \S+ \(step \d+\)", again.out.read_text()), again.text()
    assert len(steps(cluster.run(name))) == newest + 3

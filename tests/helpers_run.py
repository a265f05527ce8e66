"""Small runs for tests: shards, a configuration, a run in this process, and launched runs that can be killed."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from helpers_data import SALT, make_chexpert, make_image_folder

from scaletransfer.index import load_index
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import open_source

REPOSITORY = Path(__file__).parents[1]
MARK = "SCALETRANSFER_TEST_RUN"
CONFIG = """\
seed: 3
epochs: 4
global_batch: 16
micro_batch: 4
precision: fp32
model: {name: BiT-tiny}
data: {image_size: 32, workers: 1, augment_protocol: corrected}
optimizer: {name: sgd_agc, base_lr: 0.5, clipping: 0.02}
schedule: {kind: cosine, warmup_epochs: 1}
checkpoint: {every_steps: 4, every_minutes: null, keep: 100}
log: {every_steps: 1, tensorboard: false}
validate: {every_epochs: 2}
"""


def make_shards(base: Path, *, rows: int = 64, valid: int = 21, seed: int = 0, shard_size: int = 16) -> Path:
    """A folder of CheXpert shards with `rows` training and `valid` validation images; returns it."""
    root = make_chexpert(base / "CheXpert-v1.0", rows=rows, valid=valid, seed=seed, laterals=False)
    build(plan_shards(open_source("chexpert", root), SALT, shard_size=shard_size), base / "shards")
    return base / "shards"


def write_config(folder: Path, shards: Path, text: str = CONFIG) -> Path:
    """`tiny.yaml` in `folder`: the configuration above, on these shards, with runs in folder/runs."""
    path = folder / "tiny.yaml"
    path.write_text(f"run_dir: {folder / 'runs'}\n" + text.replace("data: {", f"data: {{train: {shards}, ", 1))
    return path


def build_single(config: Path, *overrides: str) -> Any:
    """The Trainer of a run on one process, this one."""
    from scaletransfer.config import PretrainConfig, parse_args
    from scaletransfer.engine.assemble import build_trainer
    from scaletransfer.engine.strategy import asked

    cfg, _ = parse_args(["--config", str(config), *overrides], PretrainConfig, prog="test", description="")
    return build_trainer(cfg, asked(env={}, cuda=False))


def run_single(config: Path, *overrides: str) -> Any:
    """Train on one process, this one, to the end; returns the Trainer."""
    trainer = build_single(config, *overrides)
    trainer.run()
    return trainer


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run folder."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[dict[str, Any]]:
    """The rows of steps, without those of events; each step once and in order."""
    found = [row for row in rows(folder) if "event" not in row]
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return found


@dataclass
class Launched:
    """A run that `accelerate launch` started in its own session, with its output in files."""

    process: subprocess.Popen[bytes]
    mark: str
    out: Path
    err: Path

    def ranks(self, world: int, timeout: float = 120) -> dict[int, int]:
        """Process ids by rank, from the lines that the run prints on stderr; waits for them."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            found = re.findall(r"rank (\d+) is process (\d+)", self.err.read_text())
            if len(found) == world:
                return {int(rank): int(process) for rank, process in found}
            assert self.process.poll() is None, self.text()
            time.sleep(0.02)
        raise AssertionError(f"no ranks after {timeout} s\n{self.text()}")

    def wait(self, timeout: float = 240) -> int:
        """The launcher's exit status."""
        return self.process.wait(timeout)

    def text(self) -> str:
        return f"stdout:\n{self.out.read_text()[-3000:]}\nstderr:\n{self.err.read_text()[-5000:]}"

    def error(self) -> str:
        """The one line `error: ...` of the run; other ranks may repeat it, nothing else may be said."""
        lines = [line for line in re.split(r"[\r\n]", self.err.read_text()) if "error: " in line]
        mine = [line for line in lines if line.startswith("error: ")]
        assert len(mine) == 1, self.text()
        return mine[0]

    def survivors(self) -> dict[int, str]:
        """Living processes that this launch started, by the mark in their environment: {id: command}."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if self.mark.encode() not in (entry / "environ").read_bytes():
                    continue
                if (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                    continue
                found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it ended while we looked, or is not ours
        return found

    def end(self) -> None:
        """Leave nothing behind, whatever the test did."""
        for process in self.survivors():
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(30)


def launch(
    engine: str | None,
    arguments: Sequence[str],
    folder: Path,
    *,
    module: str = "scaletransfer.pretrain",
    world: int = 2,
) -> Launched:
    """Start `accelerate launch --config_file launch/<engine>.yaml -m <module> <arguments>` in `folder`.

    Without an engine, `python -m <module> <arguments>`: one process, and no launcher to wait for.
    """
    mark = uuid.uuid4().hex
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])  # this checkout's code, whatever is installed
    environment = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m"]
    if engine is not None:
        command += ["accelerate.commands.launch", "--config_file", str(REPOSITORY / "launch" / f"{engine}.yaml")]
        command += ["--num_processes", str(world), "-m"]
    command += [module, *arguments]
    out, err = folder / f"{mark}.out", folder / f"{mark}.err"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=stdout, stderr=stderr, start_new_session=True
        )
    return Launched(process, mark, out, err)


def launch_to_end(
    engine: str | None, arguments: Sequence[str], folder: Path, *, limit: float = 240, **options: Any
) -> Launched:
    """`launch`, waited for (limit: seconds); fails with the output unless it ends well."""
    run = launch(engine, arguments, folder, **options)
    try:
        assert run.wait(limit) == 0, run.text()
    finally:
        run.end()
    return run


@functools.cache
def reading() -> dict[str, Any]:
    """What `workers_resume/reading.py` found on 2 ranks, and its validation on 1: one launch for two test files."""
    with tempfile.TemporaryDirectory(prefix="scaletransfer-reading-") as name:
        folder = Path(name)
        shards = make_shards(folder)
        quick = CONFIG.replace("sgd_agc", "sgd").replace("global_batch: 16", "global_batch: 32")
        images = make_image_folder(folder / "images", per_class=9)
        for number, path in enumerate(sorted((images / "val").rglob("*.jpg"))):
            if number % 2 == 0:
                path.unlink()  # 13 are left for validation: nothing divides them
        build(plan_shards(open_source("image_folder", images), SALT, shard_size=5), folder / "pictures")
        natural = folder / "natural"
        natural.mkdir()
        configs = [
            write_config(folder, shards, quick),
            write_config(natural, folder / "pictures", CONFIG.replace("workers: 1", "workers: 1, transform: natural")),
        ]
        arguments = [*map(str, configs), name]
        for engine, world in (("ddp", 2), (None, 1)):
            launch_to_end(engine, arguments, folder, module="workers_resume.reading", world=world)
        index = load_index(shards)
        table = index.table("train")
        return {
            "ranks": [json.loads((folder / f"world-2-rank-{rank}.json").read_text()) for rank in range(2)],
            "alone": json.loads((folder / "world-1-rank-0.json").read_text()),
            "logged": [
                [row["bytes_read"] for row in rows(folder / "runs" / f"case-{case}") if row.get("event") == "log"][-1]
                for case in range(5)
            ],
            "sizes": np.array(table["size"]),
            "valid": {"multilabel": len(index.table("valid")), "multiclass": 13},
        }

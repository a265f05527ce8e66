"""The largest network on this machine through the real command: trained, saved, killed, gone on with.

    python tools/bench/big_model.py                          BiT-S-R152x4 with 21,842 classes, fsdp2 and zero3, 2 ranks
    python tools/bench/big_model.py --model BiT-S-R50x1 --classes 1000 --engines fsdp2
    python tools/bench/big_model.py --write docs/ENGINES.md  puts what it printed between the marks there; the line of
                                                             an engine measured in the same way before stays

For each engine: `pretrain` trains `--steps` steps on drawn images and writes a sharded checkpoint
(checkpoint.asynchronous=false); as soon as that is complete all its processes are killed (SIGKILL), and the same
command goes on for `--more` steps. Peaks are the largest resident size of a rank, libraries and the loader included.
Before that, ddp is started in the same way: where the ranks of this machine have no room for it, it is refused.

Needs as much disk in `--folder` as one checkpoint takes: 8 bytes a parameter.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))

from bench.launched import started  # noqa: E402
from bench.page import check, joined, put  # noqa: E402
from scaletransfer.cli import CommandParser, run_command  # noqa: E402 (the checkout's own, installed or not)
from scaletransfer.engine.strategy import ENGINES  # noqa: E402
from scaletransfer.keys import PUBLIC_SALT  # noqa: E402
from scaletransfer.shards import build, plan_shards  # noqa: E402
from scaletransfer.sources.image_folder import ImageFolder  # noqa: E402

DOCUMENT = ROOT / "docs" / "ENGINES.md"
BEGIN, END = "<!-- big model: begin -->", "<!-- big model: end -->"
GB = 1e9
SEEN = 8
"""Classes of which there are images; the others have a name and an output."""
HEAD = [
    "| engine | peak, start | peak, steps | s a step | checkpoint | s to save | peak, resuming | peak, steps after "
    "| losses |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---|",
]


class Drawn(ImageFolder):
    """A folder of drawn images, of which most classes have none."""

    licence = "MIT; drawn by tools/bench/big_model.py"
    public = True

    def __init__(self, root: Path, classes: int) -> None:
        super().__init__(root)
        self.label_names = tuple(f"class{number:05d}" for number in range(classes))


def draw(folder: Path, images: int, classes: int, size: int) -> Path:
    """Shards of images of noise in ``folder``; where they are."""
    generator = np.random.default_rng(0)
    for number in range(images):
        path = folder / "images" / f"class{number % min(SEEN, classes):05d}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
    build(plan_shards(Drawn(folder / "images", classes), PUBLIC_SALT), folder / "shards")
    return folder / "shards"


@dataclass
class Run:
    """One start of the command, as seen from outside."""

    status: int = 0
    said: str = ""
    start_peak: dict[int, int] = field(default_factory=dict)
    """Bytes by rank, until the first step begins."""
    peak: dict[int, int] = field(default_factory=dict)
    """Bytes by rank, until the end."""
    killed: bool = False
    save_seconds: float = float("nan")


class Command:
    """`accelerate launch ... -m scaletransfer.pretrain` on drawn images."""

    def __init__(self, folder: Path, shards: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        batch = options.micro_batch * options.ranks
        self.config = folder / "big.json"
        settings: dict[str, Any] = {
            "run_dir": str(folder / "runs"),
            "epochs": 1000,
            "max_steps": options.steps + options.more,
            "global_batch": batch,
            "micro_batch": options.micro_batch,
            "precision": "fp32",
            "model": {"name": options.model, "activation_checkpointing": True},
            "data": {"train": str(shards), "transform": "natural", "image_size": options.size, "workers": 0},
            "optimizer": {"name": "sgd_agc", "base_lr": 0.64},
            "schedule": {"kind": "cosine", "warmup_epochs": 0},
            "checkpoint": {"every_steps": options.steps, "every_minutes": None, "asynchronous": False, "keep": 1},
            "log": {"every_steps": 1, "tensorboard": False},
            "validate": {"every_epochs": None},
        }
        self.config.write_text(json.dumps(settings))

    def run(self, engine: str, *extra: str, kill: bool = False) -> Run:
        """Start it and wait for its end, or kill all of it once the checkpoint is complete.

        Raises:
            ValueError: it ran longer than ``--limit`` allows, or ended before there was a checkpoint to kill it at.
        """
        checkpoint = self.folder / "runs" / engine / "checkpoints"
        latest, made, began_saving = checkpoint / "latest", Run(), 0.0
        log = self.folder / f"{engine}.log"
        end = time.monotonic() + self.options.limit
        with log.open("wb") as output, self._started(engine, extra, output) as process:
            while process.poll() is None:
                self._look(log, made)
                if kill and not began_saving and any(checkpoint.glob(".step-*.tmp")):
                    began_saving = time.monotonic()
                if kill and latest.exists():
                    made.killed = True
                    # a small one may be complete before it was seen to begin
                    made.save_seconds = time.monotonic() - began_saving if began_saving else 0.0
                    break
                if time.monotonic() > end:
                    raise ValueError(f"{engine} took longer than --limit {self.options.limit:g} s: {_end(log)}")
                time.sleep(0.1)
        made.status, made.said = process.returncode, log.read_text(errors="replace")
        if kill and not made.killed:
            raise ValueError(f"{engine} ended with status {made.status} before its checkpoint was there: {_end(log)}")
        return made

    @contextmanager
    def _started(self, engine: str, extra: Sequence[str], output: Any) -> Iterator[subprocess.Popen[bytes]]:
        """The running command; when left, all its processes are killed that still live."""
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(ROOT / "launch" / f"{engine}.yaml")]
        command += ["--num_processes", str(self.options.ranks), "-m", "scaletransfer.pretrain"]
        command += ["--config", str(self.config), f"name={engine}", *extra]
        own = {"OMP_NUM_THREADS": str(self.options.threads), "PYTHONPATH": str(ROOT)}
        with started(command, env=os.environ | own, stdout=output, stderr=output) as process:
            yield process

    def _look(self, log: Path, made: Run) -> None:
        """Note the ranks' peaks so far."""
        said = log.read_text(errors="replace")
        begun = ": training from" in said
        for rank, process in re.findall(r"rank (\d+) is process (\d+)", said):
            peak = _resident(int(process))
            if peak:
                made.peak[int(rank)] = peak
                if begun:
                    made.start_peak.setdefault(int(rank), peak)


def _resident(process: int) -> int:
    """Largest bytes of a process in memory so far; 0 when it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def _end(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]


def trained(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]


def measure(command: Command, engine: str) -> str:
    """Train, save, kill, resume under an engine; the line of the table.

    Raises:
        ValueError: a run failed, or the resumed one did not go on from the checkpoint.
    """
    options = command.options
    first = command.run(engine, kill=True)
    run = command.folder / "runs" / engine
    saved = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    second = command.run(engine)
    if second.status:
        raise ValueError(f"{engine} did not go on: it ended with status {second.status}: {second.said[-3000:]}")
    if f"(step {options.steps}) to step {options.steps + options.more}" not in second.said:
        raise ValueError(f"{engine} did not go on from step {options.steps}: {second.said[-3000:]}")
    rows = trained(run)
    steps = [row for row in rows if "loss" in row and "event" not in row]
    if [row["step"] for row in steps] != list(range(1, options.steps + options.more + 1)):
        raise ValueError(f"{engine} logged the steps {[row['step'] for row in steps]}")
    speeds = sorted(row["images_per_second"] for row in rows if row.get("event") == "log")
    seconds = options.micro_batch * options.ranks / speeds[len(speeds) // 2]
    losses = [f"{row['loss']:.4f}" for row in steps]
    peaks = [first.start_peak, first.peak, second.start_peak, second.peak]
    cells = [f"{max(peak.values()) / GB:.2f} GB" for peak in peaks]
    cells = [*cells[:2], f"{seconds:.1f}", f"{size / GB:.2f} GB", f"{first.save_seconds:.0f}", *cells[2:]]
    cells.append(", ".join(losses[: options.steps]) + " / " + ", ".join(losses[options.steps :]))
    return f"| {engine} | " + " | ".join(cells) + " |"


def refusal(command: Command) -> str:
    """What the command says of ddp before anything is allocated: why it does not fit, or that it does."""
    tried = command.run("ddp", "--dry-run")
    sentence = re.search(r"^error: (.*)$", tried.said, re.MULTILINE)
    if tried.status and sentence and "holds" in sentence[1]:
        return f"ddp is refused before it starts: {sentence[1]}"
    if tried.status:
        raise ValueError(f"ddp failed for another reason: {tried.said[-3000:]}")
    return "ddp would fit into this machine's memory."


def main(argv: Sequence[str]) -> int:
    """Run all of it and print; 0, or 1 where a rank took more than ``--most``."""
    options = _parser().parse_args(argv)
    if min(options.steps, options.more, options.ranks, options.micro_batch) < 1:
        raise ValueError("--steps, --more, --ranks and --micro-batch must be 1 or more")
    if options.write:
        check(options.write, BEGIN, END)  # before half an hour is spent
    with tempfile.TemporaryDirectory(prefix="big-model-", dir=options.folder) as name:
        folder = Path(name)
        images = options.micro_batch * options.ranks * 4
        command = Command(folder, draw(folder, images, options.classes, options.size), options)
        title = (
            f"{options.model}, {options.classes:,} classes, {options.ranks} ranks, {options.micro_batch} images of "
            f"{options.size} pixels a rank, SGD_AGC, blocks recomputed: {options.steps} steps, a checkpoint, SIGKILL, "
            f"{options.more} more."
        )
        refused = refusal(command)
        print("\n".join([title, "", refused, "", *HEAD]), flush=True)
        lines = []
        for engine in options.engines.split(","):
            lines.append(measure(command, engine))
            print(lines[-1], flush=True)
            if options.write:
                update(options.write, title, refused, lines[-1:])
            for path in sorted((folder / "runs" / engine).rglob("*.safetensors")):
                path.unlink()  # room for the next engine's
    return int(options.most is not None and _over(lines, options.most))


def update(path: Path, title: str, refused: str, lines: Sequence[str]) -> None:
    """Put the table into a page, beside lines of the same ``title`` that it has already."""
    old = check(path, BEGIN, END)[1]
    table = joined(old if title in old else "", [*HEAD, *lines], 1, lambda key: ENGINES.index(key[0]))
    put(path, BEGIN, END, "\n".join([title, "", refused, "", *table]))


def _over(lines: Sequence[str], most: float) -> bool:
    """Whether a peak of the table is above ``most`` GB, said if so."""
    found = False
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        peaks = [float(cells[column].split()[0]) for column in (1, 2, 6, 7)]
        if max(peaks) > most:
            print(f"not kept: {cells[0]} took {max(peaks):.2f} GB on a rank, more than {most:g}")
            found = True
    return found


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="tools/bench/big_model.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="BiT-S-R152x4", help="network (default: BiT-S-R152x4)")
    add("--classes", type=int, default=21_842, help="outputs (default: 21842)")
    add("--size", type=int, default=64, help="side of the images in pixels (default: 64)")
    add("--engines", default="fsdp2,zero3", metavar="A,B", help="(default: fsdp2,zero3)")
    add("--ranks", type=int, default=2, help="(default: 2)")
    add("--micro-batch", type=int, default=2, help="images a rank (default: 2)")
    add("--steps", type=int, default=3, help="before the kill (default: 3)")
    add("--more", type=int, default=2, help="after it (default: 2)")
    add("--threads", type=int, default=1, help="threads of a rank (default: 1)")
    add("--most", type=float, metavar="GB", help="exit status 1 where a rank takes more (8.5: what is promised)")
    add("--limit", type=float, default=1800, help="seconds that one start may take (default: 1800)")
    add("--folder", type=Path, help="where to work (default: the system's folder for temporary files)")
    add("--write", type=Path, metavar="FILE", help=f"put the table between the marks in FILE ({DOCUMENT.name})")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))

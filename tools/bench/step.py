"""What a forward and backward of BiT costs, next to timm's network, the published standardisation, and none at all.

    python tools/bench/step.py                          all parts, some five minutes, 6 GB of memory
    python tools/bench/step.py --only wide accumulated
    python tools/bench/step.py --json runs/bench/step.json

- r50x1: BiT-S-R50x1, batch 8, 224 pixels; ours plainly and through torch.compile, timm's resnetv2_50x1_bit in both
  memory formats, and the published way: variance and mean of each weight written out.
- wide: one unit a block at the width of R152x4, batch 2, 128 pixels: the weights outweigh the images.
- accumulated: the same network, eight micro-batches a step, weights standardised once, next to weights that are used as
  they are.
- evaluation: forwards of R50x1 in training mode and with weights that are standardised once; their logits are compared.

All ways of a part take turns in this process, round after round. Ours, timm and the published have the same weights.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers.std_conv import StdConv2d as TimmConv2d
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import measured
from scaletransfer.cli import CommandParser, run_command
from scaletransfer.models import create_model, init_weights
from scaletransfer.models.bit import Architecture, BiT
from scaletransfer.models.convolution import OnceAStep, StdConv2d
from scaletransfer.models.folding import folded

CLASSES = 1000
ACCUMULATED = 8
FORWARDS = 32
PARTS = ("r50x1", "wide", "accumulated", "evaluation")
OURS, COMPILED, TIMM, TIMM_LAST = "ours", "ours, compiled", "timm", "timm, channels_last"
PUBLISHED, NONE = "published standardisation", "no standardisation"
Result = tuple[dict[str, list[float]], list[dict[str, Any]]]


class PublishedConvolution(nn.Module):
    """A convolution of the published network: its standardisation is five operations that autograd sees."""

    def __init__(self, layer: StdConv2d) -> None:
        super().__init__()
        self.weight, self.stride, self.padding = layer.weight, layer.stride, layer.padding

    def forward(self, x: Tensor) -> Tensor:
        """[b, c_in, h, w] -> [b, c_out, h', w']."""
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        return F.conv2d(x, (self.weight - mean) / torch.sqrt(variance + 1e-10), None, self.stride, self.padding)


def published(network: nn.Module) -> nn.Module:
    """The network with published convolutions."""
    made = copy.deepcopy(network)
    for parent in list(made.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, StdConv2d):
                setattr(parent, name, PublishedConvolution(layer))
    return made


def unstandardised(network: nn.Module) -> nn.Module:
    """The network whose convolutions take their weights as they are."""
    made = copy.deepcopy(network)
    for layer in made.modules():
        if isinstance(layer, StdConv2d):
            layer.__dict__["standard"] = layer.weight  # not a second parameter
    return made


def compiled(network: nn.Module) -> nn.Module:
    """The network with its units compiled."""
    made = copy.deepcopy(network)
    made.set_compiled()  # type: ignore[operator]
    return made


def wide(width: int = 4) -> nn.Module:
    """One unit a block, `width` times as many channels as R50x1."""
    network = BiT(Architecture(name="wide", units=(1, 1, 1, 1), base=64 * width, published=False), CLASSES)
    init_weights(network, 0)
    return network


def timm_wide(width: int = 4) -> nn.Module:
    """The same of timm's blocks, as its BiT networks have them."""
    made: nn.Module = ResNetV2(
        layers=[1, 1, 1, 1],
        width_factor=width,
        num_classes=CLASSES,
        stem_type="fixed",
        conv_layer=partial(TimmConv2d, eps=1e-8),
    )
    return made


def step(network: nn.Module, images: Tensor) -> None:
    """Forward and backward of one micro-batch."""
    network.zero_grad(set_to_none=True)
    network(images).sum().backward()


def accumulate(network: nn.Module, images: Tensor, once: OnceAStep | None) -> None:
    """Forward and backward of `ACCUMULATED` micro-batches."""
    network.zero_grad(set_to_none=True)
    if once is None:
        for _ in range(ACCUMULATED):
            network(images).sum().backward()
        return
    with once.step():
        for number in range(ACCUMULATED):
            if number == ACCUMULATED - 1:
                once.last()
            network(images).sum().backward()


def last(network: nn.Module) -> nn.Module:
    """A copy in channels_last."""
    return copy.deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def part_r50x1(rounds: int, batch: int, with_compile: bool) -> Result:
    """BiT-S-R50x1 at 224 pixels."""
    network = create_model("BiT-S-R50x1", CLASSES)
    init_weights(network, 0)
    theirs = timm.create_model("resnetv2_50x1_bit", num_classes=CLASSES)
    images = torch.randn(batch, 3, 224, 224)
    ways: dict[str, Callable[[], object]] = {OURS: partial(step, network, images)}
    if with_compile:
        ours = compiled(network)
        began = time.perf_counter()
        step(ours, images)
        print(f"compiled in {time.perf_counter() - began:.0f} s (what torch has on the disk already is not made again)")
        ways[COMPILED] = partial(step, ours, images)
    ways[TIMM] = partial(step, theirs, images)
    ways[TIMM_LAST] = partial(step, last(theirs), images.to(memory_format=torch.channels_last))
    ways[PUBLISHED] = partial(step, published(network), images)
    ways[NONE] = partial(step, unstandardised(network), images)
    found = measured.take_turns(ways, rounds)
    faster = min((TIMM, TIMM_LAST), key=lambda name: median(found[name]))
    best = min((name for name in (OURS, COMPILED) if name in found), key=lambda name: median(found[name]))
    value = measured.ratio(found, faster, best)
    return found, [measured.promise(f"R50x1, {batch} of 224: {faster} / {best}", ">= 1.05", value, value >= 1.05)]


def part_wide(rounds: int) -> Result:
    """One unit a block at width 4."""
    network, images = wide(), torch.randn(2, 3, 128, 128)
    theirs = timm_wide()
    found = measured.take_turns(
        {
            OURS: partial(step, network, images),
            TIMM: partial(step, theirs, images),
            TIMM_LAST: partial(step, last(theirs), images.to(memory_format=torch.channels_last)),
            PUBLISHED: partial(step, published(network), images),
            NONE: partial(step, unstandardised(network), images),
        },
        rounds,
    )
    faster = min((TIMM, TIMM_LAST), key=lambda name: median(found[name]))
    value, other = measured.ratio(found, faster, OURS), measured.ratio(found, PUBLISHED, OURS)
    return found, [
        measured.promise(f"width 4, one unit a block, 2 of 128: {faster} / ours", ">= 1.3", value, value >= 1.3),
        measured.promise("the same: published / ours", ">= 2.5", other, other >= 2.5),
    ]


def part_accumulated(rounds: int) -> Result:
    """Eight micro-batches at width 4."""
    network, images = wide(), torch.randn(2, 3, 128, 128)
    found = measured.take_turns(
        {
            OURS: partial(accumulate, network, images, OnceAStep(network)),
            NONE: partial(accumulate, unstandardised(network), images, None),
        },
        rounds,
    )
    value = measured.ratio(found, OURS, NONE)
    what = f"width 4, {ACCUMULATED} micro-batches of 2: ours / no standardisation"
    return found, [measured.promise(what, "<= 1.05", value, value <= 1.05)]


def part_evaluation(rounds: int) -> Result:
    """Forwards of R50x1 at 224 pixels: a validation of `FORWARDS` batches of one image.

    Raises:
        ValueError: the logits differ.
    """
    network = create_model("BiT-S-R50x1", CLASSES)
    init_weights(network, 0)
    images = torch.randn(1, 3, 224, 224)

    def training() -> Tensor:
        return [network.train()(images).detach() for _ in range(FORWARDS)][-1]  # type: ignore[no-any-return]

    @torch.no_grad()
    def once() -> Tensor:
        with folded(network.eval()):
            return [network(images) for _ in range(FORWARDS)][-1]

    if not torch.equal(training(), once()):
        raise ValueError("the logits of weights that are standardised once differ from those of training mode")
    found = measured.take_turns({"training mode": training, "standardised once": once}, rounds)
    value = measured.ratio(found, "training mode", "standardised once")
    what = "evaluation of R50x1, equal logits: training mode / standardised once"
    return found, [measured.promise(what, ">= 1.15", value, value >= 1.15)]


def main(argv: Sequence[str]) -> int:
    """Measure and print the tables; 0. Raises ValueError for options that have no meaning."""
    options = _parser().parse_args(argv)
    if min(options.rounds, options.threads, options.batch) < 1:
        raise ValueError("--rounds, --threads and --batch must be at least 1")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    facts = measured.machine()
    print(
        f"{facts['processor']}, {options.threads} threads, torch {torch.__version__}, load {facts['load']}; float32\n"
    )
    parts: dict[str, Callable[[], Result]] = {
        "r50x1": lambda: part_r50x1(options.rounds, options.batch, not options.no_compile),
        "wide": lambda: part_wide(options.rounds),
        "accumulated": lambda: part_accumulated(max(3, options.rounds // 2)),
        "evaluation": lambda: part_evaluation(options.rounds),
    }
    bases = {"r50x1": PUBLISHED, "wide": PUBLISHED, "accumulated": NONE, "evaluation": "training mode"}
    seconds: dict[str, Any] = {}
    promises: list[dict[str, Any]] = []
    for name in options.only:
        seconds[name], kept = parts[name]()
        promises += kept
        print(measured.table(name, seconds[name], bases[name]) + "\n", flush=True)
    print(measured.promise_table(promises))
    measured.write(options.json, "tools/bench/step.py", argv, {"seconds": seconds, "promises": promises})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="tools/bench/step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some parts (default: all)")
    add("--batch", type=int, default=8, metavar="B", help="images of r50x1 (default: 8)")
    add("--rounds", type=int, default=7, metavar="N", help="(default: 7)")
    add("--threads", type=int, default=2, metavar="T", help="(default: 2)")
    add("--no-compile", action="store_true", help="leave out what takes a minute or two at first: torch.compile")
    add("--json", type=Path, metavar="FILE", help="write every number too")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))

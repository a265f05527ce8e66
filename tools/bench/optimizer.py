"""What a step of SGD_AGC costs, beside what memory alone costs and beside a loop over the parameters.

    python tools/bench/optimizer.py                               R50x1 and R152x1, about a minute, 1.2 GB of memory
    python tools/bench/optimizer.py --models BiT-S-R152x4         1.1 billion parameters: 18 GB of memory
    python tools/bench/optimizer.py --threads 2

Three ways take turns, round after round, on the same weights and gradients: the optimizer; the loop over parameters
that it replaced (a call for each norm, sum and product of each parameter, then torch's default SGD); and
torch.optim.SGD as it is, which clips nothing. Layouts: every parameter a tensor of its own, as under ddp; and the
second of two ranks' flat partition, as under ZeRO, which begins in the middle of a filter. The floor is the time in
which memory is copied that a step must move at least: gradient and weight read for the norms, gradient, weight and
momentum read and weight and momentum written for the update, 28 bytes a parameter.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scaletransfer.cli import CommandParser, run_command
from scaletransfer.models import create_model, head_names
from scaletransfer.optim import FLOOR, SGD_AGC
from scaletransfer.units import Segment, flat

MOVED = 28
OPTIONS: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
CLASSES = 1000


class Loop:
    """SGD_AGC as one would write it down: parameter after parameter. Gradients are changed in place."""

    def __init__(self, segments: Sequence[tuple[Tensor, Sequence[Segment], bool]], clipping: float, eps: float) -> None:
        self._segments, self._clipping, self._eps = segments, clipping, eps
        self._sgd = torch.optim.SGD([tensor for tensor, _, _ in segments], **OPTIONS)

    @torch.no_grad()
    def step(self) -> None:
        """One step on the gradients that the tensors have."""
        for tensor, segments, clipped in self._segments:
            assert tensor.grad is not None
            for segment in segments if clipped else ():
                held = slice(segment.offset, segment.offset + segment.stop - segment.start)
                weight, gradient = flat(tensor)[held], flat(tensor.grad)[held]
                for begin, end, _, count in segment.runs():
                    rows, weights = gradient[begin:end].view(count, -1), weight[begin:end].view(count, -1)
                    norm = torch.linalg.vector_norm(rows, dim=1)
                    limit = self._clipping * torch.linalg.vector_norm(weights, dim=1).clamp_min(self._eps)
                    rows.mul_(torch.where(norm > limit, limit / norm.clamp_min(FLOOR), 1.0)[:, None])
        self._sgd.step()


def tensors(model: str, layout: str) -> list[tuple[nn.Parameter, list[Segment], bool]]:
    """What an optimizer steps: (tensor with a gradient, what it is made of, whether it is clipped)."""
    with torch.device("meta"):
        network = create_model(model, CLASSES)
    head = set(head_names(network))
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    found = []
    for clipped in (True, False):
        chosen = [shape for name, shape in shapes.items() if (name not in head) == clipped]
        if layout == "whole":
            found += [
                (_drawn(shape), [Segment(shape, 0, shape.numel(), 0)], clipped) for shape in map(torch.Size, chosen)
            ]
        else:
            found.append((*_partition([torch.Size(shape) for shape in chosen]), clipped))
    return found


def _partition(shapes: Sequence[torch.Size]) -> tuple[nn.Parameter, list[Segment]]:
    """The second half of the parameters one after the other, and a few elements more, so that filters are cut."""
    total = sum(shape.numel() for shape in shapes)
    first, begin, offset = total // 2 - 5, 0, 0
    segments = []
    for shape in shapes:
        start = min(max(0, first - begin), shape.numel())
        segments.append(Segment(tuple(shape), start, shape.numel(), offset))
        offset += shape.numel() - start
        begin += shape.numel()
    return _drawn(torch.Size([offset])), segments


def _drawn(shape: torch.Size) -> nn.Parameter:
    drawn = nn.Parameter(torch.randn(shape).mul_(0.02))
    drawn.grad = torch.randn(shape).mul_(1e-4)
    return drawn


def floor(elements: int) -> Callable[[], None]:
    """Copies as many bytes as a step must move."""
    source = torch.ones(min(elements, 2**26))
    target = torch.empty_like(source)
    times = elements * MOVED / (8 * len(source))

    def copy() -> None:
        for _ in range(int(times)):
            target.copy_(source)
        rest = int((times - int(times)) * len(source))
        target[:rest].copy_(source[:rest])

    return copy


def measure(model: str, layout: str, rounds: int, clock: Callable[[], float]) -> str:
    """A row of the table."""
    made = tensors(model, layout)
    elements = sum(tensor.numel() for tensor, _, _ in made)
    groups = [{"params": [t for t, _, c in made if c]}, {"params": [t for t, _, c in made if not c], "clipping": None}]
    ours = SGD_AGC(groups, clipping=0.01, **OPTIONS)
    if layout != "whole":
        ours.set_layout({tensor: segments for tensor, segments, _ in made}, None)
    plain = torch.optim.SGD([tensor for tensor, _, _ in made], **OPTIONS)
    ways = {"floor": floor(elements), "ours": ours.step, "loop": Loop(made, 0.01, 1e-3).step, "sgd": plain.step}
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first makes momentum and plans
        for name, step in ways.items():
            began = clock()
            step()
            if number:
                spent[name].append(clock() - began)
    ours.pop_stats()
    middle = {name: median(times) for name, times in spent.items()}
    cells = [f"{1e3 * middle['floor']:.1f}"]
    for name in ("ours", "loop", "sgd"):
        low, high = (1e3 * end(spent[name]) for end in (min, max))
        ratio = middle[name] / middle["floor"]
        cells.append(f"{1e3 * middle[name]:.1f} ({low:.1f}-{high:.1f}), {ratio:.2f} x floor")
    pieces = sum(len(segments) for _, segments, _ in made)
    return f"| {model}, {layout}: {pieces} pieces, {elements / 1e6:,.1f} M | " + " | ".join(cells) + " |"


def main(argv: Sequence[str]) -> int:
    """Measure and print the table; 0. Raises ValueError for options that have no meaning."""
    options = _parser().parse_args(argv)
    if options.rounds < 1 or options.threads < 1:
        raise ValueError("--rounds and --threads must be at least 1")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    # Other programs hardly change processor time; with several threads only the clock on the wall tells.
    clock = time.process_time if options.threads == 1 else time.perf_counter
    time_of = "processor time" if options.threads == 1 else "time"
    load = f"load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else "load unknown"
    print(
        f"{options.threads} of {os.cpu_count()} cores, {load}; ms of {time_of} a step, median (smallest-largest) of "
        f"{options.rounds} rounds in turn\n"
    )
    print("| network, layout | floor | SGD_AGC | loop over parameters | torch.optim.SGD, nothing clipped |")
    print("|---|---:|---:|---:|---:|")
    for model in options.models:
        for layout in ("whole", "flat partition"):
            print(measure(model, layout, options.rounds, clock), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="tools/bench/optimizer.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["BiT-S-R50x1", "BiT-S-R152x1"], help="(default: BiT-S-R50x1 BiT-S-R152x1)")
    add("--rounds", type=int, default=11, metavar="N", help="(default: 11)")
    add("--threads", type=int, default=1, metavar="T", help="(default: 1)")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))

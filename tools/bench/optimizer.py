"""What a step of SGD_AGC costs, beside memory alone, the published loop, and timm's clipping with torch's SGD.

    python tools/bench/optimizer.py                               R50x1, half a minute, 1 GB of memory
    python tools/bench/optimizer.py --models BiT-M-R152x4 --classes 21842 --layouts whole --rounds 3      15 GB
    python tools/bench/optimizer.py --engine zero2 --models BiT-S-R101x3          2 ranks under a launcher, 7 GB
    python tools/bench/optimizer.py --engine fsdp2 --models BiT-S-R152x4          16 GB

The ways take turns, round after round, on the same weights, gradients and momentum:

- floor: memory is copied that a step must move at least: gradient and weight read for the norms, gradient, weight and
  momentum read and weight and momentum written for the update, 28 bytes a parameter;
- SGD_AGC: ours;
- published loop: parameter after parameter, norms by squares and sums, every product a tensor of its own;
- timm: its adaptive_clip_grad, then torch.optim.SGD, fused.

Layouts: every parameter a tensor of its own, as under ddp; and the second of two ranks' flat partition, as under ZeRO,
which begins in the middle of a filter and which the last two ways cannot step. With --engine two ranks run a real
engine, both measure at the same time, and a rank's floor is that of its shard.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import measured
from bench.launched import launch
from scaletransfer.cli import CommandParser, run_command
from scaletransfer.models import create_model, head_names
from scaletransfer.optim import SGD_AGC
from scaletransfer.units import Segment

MOVED = 28
OPTIONS: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
CLIPPING, EPS = 0.01, 1e-3
FLOOR, OURS, PUBLISHED, TIMM = "floor", "SGD_AGC", "published loop", "timm's clipping, fused SGD"
WANTED = {("BiT-M-R152x4", PUBLISHED): 12.0, ("BiT-S-R152x4", PUBLISHED): 12.0, ("BiT-S-R50x1", PUBLISHED): 4.5}
OF_FLOOR, OF_SHARD = 1.3, 1.4
Made = list[tuple[nn.Parameter, list[Segment], bool]]


class PublishedLoop:
    """SGD with adaptive gradient clipping as it was published: a loop over the parameters for each of the two."""

    def __init__(self, made: Made, momentum: dict[nn.Parameter, Tensor]) -> None:
        self._parameters, self._momentum = [(p, clipped) for p, _, clipped in made], momentum

    @staticmethod
    def _norm(x: Tensor) -> Tensor:
        if x.dim() <= 1:
            return torch.sum(x**2) ** 0.5
        return torch.sum(x**2, dim=tuple(range(1, x.dim())), keepdim=True) ** 0.5

    @torch.no_grad()
    def step(self) -> None:
        """One step on the gradients that the parameters have."""
        for p, clipped in self._parameters:
            if not clipped or p.grad is None:
                continue
            largest = CLIPPING * torch.max(self._norm(p), torch.tensor(EPS))
            norm = self._norm(p.grad)
            shortened = p.grad * (largest / torch.max(norm, torch.tensor(1e-6)))
            p.grad.copy_(torch.where(norm > largest, shortened, p.grad))
        for p, _ in self._parameters:
            assert p.grad is not None
            change = p.grad.add(p, alpha=OPTIONS["weight_decay"])
            self._momentum[p].mul_(OPTIONS["momentum"]).add_(change)
            p.add_(change.add(self._momentum[p], alpha=OPTIONS["momentum"]), alpha=-OPTIONS["lr"])


class TimmSteps:
    """timm's function, then torch's optimizer in its fastest form."""

    def __init__(self, made: Made, momentum: dict[nn.Parameter, Tensor]) -> None:
        self._clipped = [p for p, _, clipped in made if clipped]
        self._sgd = torch.optim.SGD([p for p, _, _ in made], **OPTIONS, fused=True)
        for p, kept in momentum.items():
            self._sgd.state[p]["momentum_buffer"] = kept

    def step(self) -> None:
        """One step on the gradients that the parameters have."""
        adaptive_clip_grad(self._clipped, clip_factor=CLIPPING, eps=EPS)
        self._sgd.step()


def tensors(model: str, classes: int, layout: str) -> Made:
    """What an optimizer steps: (tensor with a gradient, what it is made of, whether it is clipped)."""
    with torch.device("meta"):
        network = create_model(model, classes)
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


def measure(model: str, classes: int, layout: str, rounds: int) -> dict[str, Any]:
    """Seconds of each way, and how many numbers they stepped."""
    made = tensors(model, classes, layout)
    elements = sum(tensor.numel() for tensor, _, _ in made)
    groups = [{"params": [t for t, _, c in made if c]}, {"params": [t for t, _, c in made if not c], "clipping": None}]
    ours = SGD_AGC(groups, clipping=CLIPPING, eps=EPS, **OPTIONS)
    if layout != "whole":
        ours.set_layout({tensor: segments for tensor, segments, _ in made}, None)
    ours.step()
    momentum = {tensor: ours.state[tensor]["momentum_buffer"] for tensor, _, _ in made}
    ways: dict[str, Callable[[], object]] = {FLOOR: floor(elements), OURS: ours.step}
    if layout == "whole":
        ways |= {PUBLISHED: PublishedLoop(made, momentum).step, TIMM: TimmSteps(made, momentum).step}
    found = measured.take_turns(ways, rounds)
    ours.pop_stats()
    return {"model": model, "layout": layout, "tensors": len(made), "elements": elements, "seconds": found}


def under_engine(engine: str, model: str, classes: int, rounds: int) -> dict[str, Any]:
    """The same of two ranks of a launched engine: the slower rank's medians.

    Raises:
        ValueError: the launch failed.
    """
    with tempfile.TemporaryDirectory(prefix="optimizer-") as name:
        spec = Path(name) / "spec.json"
        spec.write_text(json.dumps({"model": model, "classes": classes, "rounds": rounds, "threads": 1}))
        launch(engine, 2, [str(Path(__file__).with_name("optimizer_worker.py")), str(spec)], threads=1, limit=1500)
        ranks = [json.loads((Path(name) / f"rank-{rank}.json").read_text()) for rank in range(2)]
    slower = max(ranks, key=lambda rank: median(rank["seconds"][OURS]) / median(rank["seconds"][FLOOR]))
    return {"model": model, "layout": f"{engine}, 2 ranks", "tensors": slower["tensors"], **slower}


def promises(row: dict[str, Any]) -> list[dict[str, Any]]:
    """What the project promises of a line of the table."""
    found, name = row["seconds"], f"{row['model']}, {row['layout']}"
    limit = OF_FLOOR if row["layout"] == "whole" else OF_SHARD
    value = measured.ratio(found, OURS, FLOOR)
    kept = [measured.promise(f"{name}: SGD_AGC / floor", f"<= {limit}", value, value <= limit)]
    wanted = WANTED.get((row["model"], PUBLISHED))
    if wanted and PUBLISHED in found:
        value = measured.ratio(found, PUBLISHED, OURS)
        kept.append(measured.promise(f"{name}: published / SGD_AGC", f">= {wanted}", value, value >= wanted))
    return kept


def main(argv: Sequence[str]) -> int:
    """Measure and print the tables; 0. Raises ValueError for options that have no meaning."""
    options = _parser().parse_args(argv)
    if options.rounds < 1 or options.threads < 1:
        raise ValueError("--rounds and --threads must be at least 1")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    facts = measured.machine()
    print(
        f"{facts['processor']}, {options.threads} threads, torch {torch.__version__}, load {facts['load']}; float32\n"
    )
    rows = []
    for model in options.models:
        if options.engine:
            rows.append(under_engine(options.engine, model, options.classes, options.rounds))
        else:
            rows += [measure(model, options.classes, layout, options.rounds) for layout in options.layouts]
        for row in rows[-1 if options.engine else -len(options.layouts) :]:
            title = f"{row['model']}, {row['layout']}: {row['tensors']} tensors, {row['elements'] / 1e6:,.1f} M"
            print(measured.table(title, row["seconds"], FLOOR) + "\n", flush=True)
    kept = [one for row in rows for one in promises(row)]
    print(measured.promise_table(kept))
    measured.write(options.json, "tools/bench/optimizer.py", argv, {"rows": rows, "promises": kept})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="tools/bench/optimizer.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["BiT-S-R50x1"], help="(default: BiT-S-R50x1)")
    add("--classes", type=int, default=1000, help="(default: 1000)")
    add("--layouts", nargs="+", choices=["whole", "flat"], default=["whole", "flat"], help="(default: both)")
    add("--engine", choices=["ddp", "fsdp2", "zero1", "zero2", "zero3"], help="two ranks of a real engine instead")
    add("--rounds", type=int, default=9, metavar="N", help="(default: 9)")
    add("--threads", type=int, default=2, metavar="T", help="without --engine (default: 2)")
    add("--json", type=Path, metavar="FILE", help="write every number too")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))

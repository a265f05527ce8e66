"""How well the training order shuffles, next to a true permutation of the same samples.

    python tools/bench/shuffle.py shards/chexpert          an epoch of these shards
    python tools/bench/shuffle.py                          drawn: 40 shards of 5,000 samples, three sources, 14 classes

Four numbers, each for our order and for a permutation:

- batch, same shard: share of the pairs of samples in one batch that lie in the same shard;
- run of a source, run of a class: mean and longest run of consecutive positions with the same source, or class;
- neighbours, steps apart: samples that lie side by side in a shard: median and tenth percentile of the number of steps
  between them, which is what a shuffle by shards and windows gives up;
- class share, deviation: how far the share of the largest class in a batch strays from its share of the epoch (the
  standard deviation over the batches): larger than a permutation's would mean that batches are one-sided.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaletransfer.cli import CommandParser, run_command
from scaletransfer.index import load_index
from scaletransfer.order import WINDOW, Order, permutation


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    options = _parser().parse_args(argv)
    shards, classes = _opened(options.folders) if options.folders else _drawn(options.seed)
    order = Order(
        shards=tuple(map(tuple, shards)), weights=(None,) * len(shards), seed=options.seed, global_batch=options.batch
    )
    source, row = order.locate(np.arange(order.samples_per_epoch))
    starts = np.concatenate([[0], np.cumsum(order.sizes)])
    ours = starts[source] + row
    theirs = permutation(options.seed, 0, 999, int(starts[-1]))[: order.samples_per_epoch]
    edges = np.cumsum(np.concatenate([np.array(sizes) for sizes in shards]))
    print(
        f"{int(starts[-1]):,} samples in {len(edges)} shards, {len(shards)} source(s); batches of {options.batch}, "
        f"{order.steps_per_epoch} steps, windows of {WINDOW}\n"
    )
    facts = [
        _measure(samples, options.batch, edges, starts, classes, order.steps_per_epoch) for samples in (ours, theirs)
    ]
    print("| | our order | a permutation |\n|---|---:|---:|")
    for name in facts[0]:
        print(f"| {name} | {facts[0][name]} | {facts[1][name]} |")
    return 0


def _measure(
    samples: np.ndarray, batch: int, edges: np.ndarray, starts: np.ndarray, classes: np.ndarray, steps: int
) -> dict[str, str]:
    shard = np.searchsorted(edges, samples, side="right").reshape(-1, batch)
    same = [(np.bincount(one) * (np.bincount(one) - 1)).sum() / (batch * (batch - 1)) for one in shard[:500]]
    source = np.searchsorted(starts, samples, side="right")
    found = {"batch, same shard": f"{np.mean(same):.4f}"}
    for name, values in (("run of a source", source), ("run of a class", classes[samples])):
        runs = np.diff(np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1], [True]])))
        found[f"{name}, mean (longest)"] = f"{runs.mean():.2f} ({runs.max()})"
    when = np.full(int(starts[-1]), -1, dtype=np.int64)
    when[samples] = np.arange(len(samples)) // batch
    beside = np.flatnonzero((when[1:] >= 0) & (when[:-1] >= 0) & ~np.isin(np.arange(1, len(when)), edges))
    apart = np.abs(when[beside + 1] - when[beside])
    found["neighbours, steps apart: median"] = f"{np.median(apart):.0f} of {steps}"
    found["neighbours, steps apart: tenth percentile"] = f"{np.percentile(apart, 10):.0f}"
    largest = np.bincount(classes).argmax()
    shares = (classes[samples].reshape(-1, batch) == largest).mean(axis=1)
    found["class share, deviation"] = f"{shares.std():.4f}"
    return found


def _drawn(seed: int) -> tuple[list[list[int]], np.ndarray]:
    """Three sources, shards of 5,000 that make_shards has shuffled, 14 classes of unequal size."""
    shards = [[5000] * 24, [5000] * 10 + [1234], [5000] * 5]
    generator = np.random.default_rng(seed)
    weights = 1 / np.arange(1, 15)
    return shards, generator.choice(14, sum(map(sum, shards)), p=weights / weights.sum())


def _opened(folders: Sequence[Path]) -> tuple[list[list[int]], np.ndarray]:
    """The training split of folders of shards; multi-label sets have the number of positive labels as class."""
    shards, classes = [], []
    for folder in folders:
        index = load_index(folder)
        if "train" not in index.splits:
            raise ValueError(f"{folder} has no split train: give shards that are trained on")
        table: Any = index.table("train")
        shards.append([shard.samples for shard in index.splits["train"].shards])
        classes.append(table["label"] if index.task == "multiclass" else (table["labels"] == 1).sum(axis=1))
    return shards, np.concatenate(classes).astype(np.int64)


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="tools/bench/shuffle.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="folders of shards (default: drawn sizes)")
    parser.add_argument("--batch", type=int, default=256, metavar="B", help="global batch (default: 256)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the order (default: 0)")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))

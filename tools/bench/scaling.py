"""How start-up, resume and memory grow with the number of samples and shards: seconds, bytes and fitted exponents.

    python tools/bench/scaling.py                   1e3 to 1e7 samples, 1e2 to 1e5 shards: about three minutes, 1.5 GB
    python tools/bench/scaling.py --quick           to 1e5 samples and 1e3 shards

For each size an index is written whose shards are files of the right length with nothing in them (sparse). A fresh
process then opens it as training does (`load_index`: every shard there and of its length; sample table: hashed and
checked row by row), makes the order of a rank and asks it for the rank's first batch, and for the batch in the middle
of the third epoch, as a resumed run does. Times are without Python's imports; memory is the process's peak. An exponent
is the slope of log time over log size by least squares, over the sizes that take at least `--least` seconds: below that
the clock tells nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import measured
from scaletransfer.cli import CommandParser, run_command
from scaletransfer.index import load_index, write_index
from scaletransfer.order import Order, rank_positions
from scaletransfer.sample_table import table_dtype

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = (10**3, 10**4, 10**5, 10**6, 10**7)
SHARDS = (10**2, 10**3, 10**4, 10**5)
A_SHARD = 1_000
OF_SHARDS = 1_000_000
"""Samples of the indexes that differ in shards only."""
IMAGE, BLOCK, ROWS = 21_000, 1024, 2**20
RANKS, BATCH, MICRO = 64, 4096, 16
LABELS = 13
PROMISED = {"opened": 3.0, "ordered": 2.0, "peak_mb": 1024.0}


def make(folder: Path, samples: int, shards: int) -> None:
    """An index of so many samples in so many shards of about equal numbers."""
    folder.mkdir(parents=True)
    counts = np.diff(np.linspace(0, samples, shards + 1).astype(np.int64))
    place = IMAGE + BLOCK
    names = [f"train-{number:06d}.tar" for number in range(shards)]
    for name, count in zip(names, counts.tolist(), strict=True):
        with open(folder / name, "wb") as file:
            file.truncate(count * place + 2 * BLOCK)
    dtype = table_dtype("multilabel", LABELS)
    starts = np.concatenate([[0], np.cumsum(counts)])
    table = np.lib.format.open_memmap(folder / "samples-train.npy", mode="w+", dtype=dtype, shape=(samples,))
    for first in range(0, samples, ROWS):
        row = np.arange(first, min(first + ROWS, samples))
        part = table[first : first + ROWS]
        part["shard"] = np.searchsorted(starts, row, side="right") - 1
        part["offset"] = BLOCK + (row - starts[part["shard"]]) * place
        part["size"], part["crc"], part["view"] = IMAGE, 1, -1
        part["key"] = row.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # odd: all keys are different
        part["patient"] = row // 3
    table.flush()
    del table
    with open(folder / "samples-train.npy", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    labels = [f"finding{number}" for number in range(LABELS)]
    states = {"positive": 0, "negative": samples, "uncertain": 0, "not_mentioned": 0}
    infos = [
        {"file": name, "samples": count, "bytes": count * place + 2 * BLOCK, "sha256": "0" * 64}
        for name, count in zip(names, counts.tolist(), strict=True)
    ]
    split = {
        "samples": samples,
        "patients": samples // 3 + 1,
        "table": "samples-train.npy",
        "table_sha256": digest,
        "shards": infos,
        "totals": dict.fromkeys(labels, states),
        "quarantine": [],
    }
    write_index(
        folder,
        {
            "source": "chexpert",
            "task": "multilabel",
            "label_names": labels,
            "label_kind": "states",
            "views": [],
            "image": {"extension": "jpg", "size": 256, "channels": 1, "bit_depth": 8, "pixel_max": 255},
            "splits": {"train": split},
            "salt_fingerprint": "none",
            "licence": "drawn",
            "encoder": {},
            "options": {},
            "plan_sha256": "0" * 64,
        },
    )


def start(folder: Path) -> dict[str, float]:
    """Open the index, start the order of one rank, resume it; seconds of each and the peak of this process in MB."""
    began = time.perf_counter()
    index = load_index(folder)
    table = index.table("train")
    opened = time.perf_counter()
    order = Order(
        shards=(tuple(shard.samples for shard in index.splits["train"].shards),),
        weights=(None,),
        seed=0,
        global_batch=min(BATCH, len(table)),
    )
    batch = order.global_batch
    ranks = RANKS if batch == BATCH else 1
    micro = MICRO if batch == BATCH else batch
    table[order.locate(rank_positions(0, ranks // 2, ranks, micro, batch).ravel())[1]]
    ordered = time.perf_counter()
    middle = int(2.5 * order.steps_per_epoch)
    table[order.locate(rank_positions(middle, ranks // 2, ranks, micro, batch).ravel())[1]]
    resumed = time.perf_counter()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return {
        "opened": opened - began,
        "ordered": ordered - opened,
        "resumed": resumed - ordered,
        "peak_mb": int(peak.split()[1]) / 1024,
    }


def fresh(folder: Path, starts: int) -> dict[str, list[float]]:
    """`start` in so many processes, one after the other."""
    found: dict[str, list[float]] = {}
    for _ in range(starts):
        command = [sys.executable, str(Path(__file__).resolve()), "--start", str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise ValueError(f"a start failed: {' / '.join(done.stderr.strip().splitlines()[-3:])}")
        for key, value in json.loads(done.stdout).items():
            found.setdefault(key, []).append(value)
    return found


def exponent(sizes: Sequence[int], seconds: Sequence[float], least: float) -> float | None:
    """The slope of log seconds over log size where seconds are at least `least`; None for fewer than two such sizes."""
    pairs = [(size, value) for size, value in zip(sizes, seconds, strict=True) if value >= least]
    if len(pairs) < 2:
        return None
    x, y = np.log(np.array(pairs)).T
    return float(np.polyfit(x, y, 1)[0])


def main(argv: Sequence[str]) -> int:
    """Measure and print the tables; 0. Raises ValueError for options that have no meaning."""
    options = _parser().parse_args(argv)
    if options.start:
        print(json.dumps(start(options.start)))
        return 0
    if options.starts < 1:
        raise ValueError("--starts must be at least 1")
    samples, shards = (SAMPLES[:3], SHARDS[:2]) if options.quick else (SAMPLES, SHARDS)
    cases = [("samples", count, count, max(1, count // A_SHARD)) for count in samples]
    cases += [("shards", count, 10**5 if options.quick else OF_SHARDS, count) for count in shards]
    rows: list[dict[str, Any]] = []
    print("| samples | shards | index opened, s | order started, s | resumed, s | peak, MB |")
    print("|---:|---:|---:|---:|---:|---:|", flush=True)
    for kind, size, count, files in cases:
        with tempfile.TemporaryDirectory(prefix="scaling-", dir=options.data) as name:
            folder = Path(name) / "shards"
            make(folder, count, files)
            found = fresh(folder, options.starts)
            shutil.rmtree(folder)
        rows.append({"kind": kind, "size": size, "samples": count, "shards": files, "found": found})
        cells = [f"{median(found[key]):.3f}" for key in ("opened", "ordered", "resumed")]
        print(f"| {count:,} | {files:,} | " + " | ".join(cells) + f" | {median(found['peak_mb']):,.0f} |", flush=True)
    exponents = {
        f"{key}, by {kind}": exponent(
            [row["size"] for row in rows if row["kind"] == kind],
            [median(row["found"][key]) for row in rows if row["kind"] == kind],
            options.least,
        )
        for kind in ("samples", "shards")
        for key in ("opened", "ordered", "resumed")
    }
    print("\n| exponent | |\n|---|---:|")
    for name, value in exponents.items():
        print(f"| {name} | {'too short to tell' if value is None else f'{value:.2f}'} |")
    largest = next(row for row in rows if row["samples"] == max(samples))
    kept = []
    for key, limit in PROMISED.items():
        value = median(largest["found"][key])
        what = f"{largest['samples']:,} samples in {largest['shards']:,} shards: {key}"
        kept.append(measured.promise(what, f"< {limit:g}", value, value < limit))
    print("\n" + measured.promise_table(kept))
    content = {"rows": rows, "exponents": exponents, "promises": kept}
    measured.write(options.json, "tools/bench/scaling.py", argv, content)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="tools/bench/scaling.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--starts", type=int, default=3, metavar="N", help="processes a size (default: 3)")
    add("--least", type=float, default=0.02, metavar="S", help="seconds from which sizes are fitted (default: 0.02)")
    add("--data", type=Path, metavar="FOLDER", help="where indexes are made (default: the system's)")
    add("--quick", action="store_true", help="up to 1e5 samples and 1e3 shards")
    add("--json", type=Path, metavar="FILE", help="write every number too")
    add("--start", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))

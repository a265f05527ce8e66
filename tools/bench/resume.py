"""What it takes to resume in the middle of ten million samples: seconds to the first batch, bytes, images decoded.

    python tools/bench/resume.py                  about two minutes, 0.8 GB in --data
    python tools/bench/resume.py --quick          a million samples, one start of each
    python tools/bench/resume.py --samples 100000000 --step 1000000

A folder of shards is made whose sample table has that many rows; behind it lie a few real shards under many names
(hard links), so that every row is an image that can be read. Then a fresh process opens it by its files alone and takes
the first batch of the step. "Cold" means that the sample table and the shards were put out of the page cache before.
Next to it: mosaicml-streaming, in the same situation; and webdataset, which has no way but to read what was seen: how
fast it passes over samples is measured on the real shards, and the rest is arithmetic.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.bench_data import Data, prepare
from bench.conductor import ONE_THREAD, TOOLS
from bench.loader import RUNS, SETS
from bench.peer_environments import missing, python_of
from scaletransfer.cli import CommandParser, run_command
from scaletransfer.index import FORMAT_VERSION, load_index, write_index

HERE = Path(__file__).resolve().parent
A_SHARD = 4700  # samples of 21 KB that make 100 MB, the default size of a shard
QUICK_SAMPLES = 1_000_000
STARTS = 3


def main(argv: Sequence[str]) -> int:
    """Measure and print the table; 0. Raises ValueError for options that have no meaning."""
    options = _parser().parse_args(argv)
    samples = options.samples or (QUICK_SAMPLES if options.quick else 10_000_000)
    starts = 1 if options.quick else STARTS
    step = options.step if options.step is not None else samples // 100
    seen = step * options.batch
    if min(samples, options.batch) < 1 or step < 0 or options.workers < 0:
        raise ValueError("--samples and --batch must be at least 1, --step and --workers at least 0")
    images = prepare(SETS["xray256"], options.data, _say)
    folder = many_samples(images, samples, options.data / f"resume-{samples}")
    size = (folder / "samples-train.npy").stat().st_size
    print(
        f"{samples:,} samples in {samples // A_SHARD + (samples % A_SHARD > 0):,} shards, sample table "
        f"{size / 1e6:,.0f} MB; the first batch of step {step:,} with batches of {options.batch}: {seen:,} samples "
        f"seen. {options.workers} workers, {os.cpu_count()} cores, median of {starts} starts.\n"
    )
    rows = [
        "| program | first batch after | imports | data opened | bytes read | images decoded | of them seen | MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    settings = {"shards": str(folder.absolute()), "kind": "xray", "augment": "crop", "size": 224, "seen": seen}
    settings |= {"batch": options.batch, "workers": options.workers}
    for name in ("cold", "warm"):
        found = []
        for _ in range(starts):
            if name == "cold":
                _put_out(folder)
            found.append(_started([sys.executable, str(HERE / "resume_ours.py")], settings))
        rows.append(_ours(f"ours, {name}", found))
    rows.append(_webdataset(images, seen, options.quick))
    rows.append(_streaming(images, samples, settings, options.peers, options.data))
    print("\n".join(rows))
    return 0


def many_samples(images: Data, samples: int, folder: Path) -> Path:
    """A folder of shards with `samples` rows, made unless it is there; the files behind it are hard links."""
    made = folder / "index.json"
    if made.exists() and json.loads(made.read_text())["format_version"] == FORMAT_VERSION:
        return folder
    _say(f"making an index of {samples:,} samples")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    real = load_index(images.shards)
    split, table = real.splits["train"], real.table("train")
    by_shard = [table[table["shard"] == number] for number in range(len(split.shards))]
    whole = np.empty(samples, table.dtype)
    shards: list[dict[str, Any]] = []
    for first in range(0, samples, A_SHARD):
        number, count = len(shards), min(A_SHARD, samples - first)
        info, rows = split.shards[number % len(by_shard)], by_shard[number % len(by_shard)]
        # a real shard's rows, over and over; sorted, so that they are read from its beginning to its end
        whole[first : first + count] = rows[np.arange(count) * len(rows) // count]
        whole["shard"][first : first + count] = number
        name = f"train-{number:06d}.tar"
        os.link(images.shards / info.file, folder / name)
        shards.append({"file": name, "samples": count, "bytes": info.bytes, "sha256": info.sha256})
    np.save(folder / "samples-train.npy", whole)
    with open(folder / "samples-train.npy", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    content: dict[str, Any] = json.loads((images.shards / "index.json").read_text())
    counts = np.bincount(whole["label"], minlength=len(real.label_names)).tolist()
    content["splits"]["train"] |= {"samples": samples, "shards": shards, "table_sha256": digest}
    content["splits"]["train"]["totals"] = dict(zip(real.label_names, counts, strict=True))
    write_index(folder, content)
    return folder


def _put_out(folder: Path) -> None:
    """Ask the system to forget the contents of a folder's files."""
    if not hasattr(os, "posix_fadvise"):
        return
    os.sync()
    for path in {path.stat().st_ino: path for path in folder.iterdir()}.values():
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _started(command: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """What a fresh process prints. Raises ValueError with its last words if it failed."""
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(TOOLS)}
    text = json.dumps({**settings, "started": time.time()})
    done = subprocess.run([*command, text], check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ValueError(f"{command[-1]} failed: {' / '.join(done.stderr.strip().splitlines()[-3:])}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _ours(name: str, found: Sequence[dict[str, Any]]) -> str:
    middle = {key: median([one[key] for one in found]) for key in found[0]}
    cells = [
        f"{middle['ready']:.2f} s ({min(one['ready'] for one in found):.2f}-{max(one['ready'] for one in found):.2f})",
        f"{middle['imported']:.2f} s",
        f"{middle['opened'] - middle['imported']:.2f} s",
        f"{middle['read'] / 1e6:,.1f} MB, of them images of the batch {middle['batch_bytes'] / 1e6:.1f}",
        f"{middle['decoded']:.0f}",
        f"{max(one['decoded_seen'] for one in found)}",
        f"{middle['resident_mb']:,.0f}",
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def _webdataset(images: Data, seen: int, quick: bool) -> str:
    command = [sys.executable, str(HERE / "peers" / "webdataset_skip.py")]
    tars = [str(path.absolute()) for path in images.tars]
    rate = _started(command, {"tars": tars, "seconds": 1 if quick else 5})
    seconds, size = seen / rate["samples"], seen * rate["bytes"] / rate["samples"]
    # the page cache can give all of this only once it is in memory: a disk makes it slower, never faster
    return (
        f"| webdataset, reading what was seen: extrapolated from {rate['samples']:,.0f} samples/s of one process, "
        f"nothing decoded | {seconds:,.0f} s | | | {size / 1e9:,.0f} GB | 0 | | |"
    )


def _streaming(images: Data, samples: int, settings: dict[str, Any], peers: Path, data: Path) -> str:
    install = missing("mosaicml-streaming", peers)
    if install:
        return f"| mosaicml-streaming | not installed: `{install}` | | | | | | |"
    command = [python_of("mosaicml-streaming", peers), str(HERE / "peers" / "streaming_resume.py")]
    folder = data / f"resume-{samples}-mds"
    tars = [str(path.absolute()) for path in images.tars]
    try:
        if not folder.exists():
            _say("making an MDS folder with as many samples")
            _started(command, {"do": "make", "mds": str(folder.absolute()), "tars": tars, "samples": samples})
        found = _started(command, {**settings, "do": "resume", "mds": str(folder.absolute())})
    except ValueError as error:
        return f"| mosaicml-streaming | {error} | | | | | | |"
    opened = found["opened"] - found["imported"]
    return f"| mosaicml-streaming, warm | {found['ready']:.2f} s | {found['imported']:.2f} s | {opened:.2f} s | | | | |"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="tools/bench/resume.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--samples", type=int, metavar="N", help="rows of the sample table (default: 10 million; quick: 1 million)")
    add("--step", type=int, metavar="K", help="the step that is resumed (default: a hundredth of the samples)")
    add("--batch", type=int, default=64, metavar="B", help="the global batch (default: 64)")
    add("--workers", type=int, default=2, metavar="W", help="of every loader (default: 2)")
    add("--data", type=Path, default=RUNS / "data", help="folder for what is made (default: runs/bench/data)")
    add("--peers", type=Path, default=RUNS / "peers", help="environments of peers, see loader.py (runs/bench/peers)")
    add("--quick", action="store_true", help="a million samples, one start")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))

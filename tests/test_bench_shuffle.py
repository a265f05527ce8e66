"""The benchmark of the order prints what docs/DATA.md says it does, and the order stays near a permutation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_it_compares_the_order_with_a_permutation():
    command = [sys.executable, "tools/bench/shuffle.py", "--batch", "64"]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120).stdout
    assert text.startswith("196,234 samples in 40 shards, 3 source(s); batches of 64, 3066 steps")
    found = dict(re.findall(r"\| ([^|]+?) \| ([^|]+? \| [^|]+?) \|", text))
    pairs = {
        name: [float(re.match(r"[\d.]+", value)[0]) for value in cells.split(" | ")] for name, cells in found.items()
    }
    ours, theirs = pairs["batch, same shard"]
    assert ours < 1.2 * theirs
    ours, theirs = pairs["run of a class, mean (longest)"]
    assert abs(ours / theirs - 1) < 0.05
    ours, theirs = pairs["class share, deviation"]
    assert ours < 1.2 * theirs
    ours, theirs = pairs["neighbours, steps apart: median"]
    assert ours > 0.05 * theirs

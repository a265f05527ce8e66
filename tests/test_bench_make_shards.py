"""tools/bench/make_shards.py runs, and refuses options without a meaning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / "bench" / "make_shards.py"), *options]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)


def test_it_prints_the_table_and_leaves_nothing(tmp_path):
    done = bench("--images", "3", "--repeats", "1", "--folder", str(tmp_path / "here"))
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"(?m)^(\S.*?)  +([\d.]+) +\d+% +([\d.]+) +[\d.]+ x +[\d.]+$", done.stdout)
    assert [name for name, _, _ in rows] == [
        "the limit, 1 thread",
        "the limit, 2 threads",
        "ours, 1 worker",
        "ours, 2 workers",
        "cv2 + TarWriter, read as colour",
        "cv2 + TarWriter, read as grey",
        "PIL + TarWriter",
    ]
    assert all(float(rate) > 0 for _, rate, _ in rows) and rows[0][2] == "1.00"
    assert float(re.search(r"([\d.]+) dB PSNR or better", done.stdout)[1]) > 50
    assert list((tmp_path / "here").iterdir()) == []


def test_options_without_a_meaning():
    done = bench("--images", "0")
    assert done.returncode == 2 and done.stderr == "error: --images is 0; it must be at least 1\n"

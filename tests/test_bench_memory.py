"""`tools/bench/memory.py` as it is documented, on a small network: states are shares, starts are bounded."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_engine import environment

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.engine
@pytest.mark.slow
def test_fsdp2_and_zero3_hold_their_share(tmp_path: Path):
    command = [sys.executable, "tools/bench/memory.py", "--model", "BiT-S-R50x1", "--classes", "5000", "--ranks", "2"]
    command += ["--engines", "single,fsdp2,zero3", "--checkpointing", "on", "--size", "32", "--steps", "2"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "rows.json")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^\| (single|fsdp2|zero3) \|", done.stdout, re.MULTILINE)) == 3
    single, fsdp2, zero3 = json.loads((tmp_path / "rows.json").read_text())
    for row in (fsdp2, zero3):
        assert row["held"] == pytest.approx(row["share"], rel=0.1)
        assert row["loss"] != single["loss"], "the ranks see images of their own"
    assert single["held"] == pytest.approx(single["share"], rel=0.01)
    assert fsdp2["loss"] == pytest.approx(zero3["loss"], rel=1e-5)

"""`tools/bench/big_model.py` as it is documented, on a small network: trained, saved, killed, gone on with."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_engine import environment

ROOT = Path(__file__).resolve().parents[1]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/bench/big_model.py", *options]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)


@pytest.mark.engine
@pytest.mark.slow
def test_both_engines_save_are_killed_and_go_on(tmp_path: Path):
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- big model: begin -->\nold\n<!-- big model: end -->\nafter\n")
    options = ["--model", "BiT-tiny", "--classes", "300", "--size", "32", "--steps", "2", "--more", "1"]
    done = run(*options, "--folder", str(tmp_path), "--write", str(document), "--most", "8.5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ddp would fit" in done.stdout
    rows = {
        line.split("|")[1].strip(): line for line in done.stdout.splitlines() if re.match(r"\| (fsdp2|zero3) ", line)
    }
    assert set(rows) == {"fsdp2", "zero3"}
    losses = {engine: [float(loss) for loss in re.findall(r"\d+\.\d{4}", row)] for engine, row in rows.items()}
    assert len(losses["fsdp2"]) == 3
    assert losses["zero3"] == pytest.approx(losses["fsdp2"], abs=2e-4)
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert rows["fsdp2"] in text
    assert not list(tmp_path.glob("big-model-*"))


@pytest.mark.engine
@pytest.mark.slow
def test_ddp_of_the_largest_is_refused_with_its_numbers_and_too_much_is_said(tmp_path: Path):
    # 40 times the width: 100 billion parameters and more have no room anywhere that tests run
    done = run("--model", "BiT-S-R152x40", "--classes", "10", "--engines", "fsdp2", "--folder", str(tmp_path))
    assert done.returncode != 0
    assert re.search(r"ddp is refused before it starts: ddp on 2 ranks holds [\d.]+ GiB a rank", done.stdout)
    assert "before its checkpoint was there" in done.stderr

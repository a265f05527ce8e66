"""`tools/bench/memory.py` as it is documented, on a small network: states are shares, starts are bounded."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_engine import environment

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from bench.memory import BEGIN, END, ROOT, line, promises, update


def row(
    engine: str, ranks: int, *, recompute: bool = True, held: float = 1e9, beyond: float = 0.0
) -> dict[str, object]:
    sizes = dict.fromkeys(("birth_peak", "train_peak", "expected", "share"), 1e9)
    return {
        **sizes,
        "engine": engine,
        "ranks": ranks,
        "checkpointing": recompute,
        "held": held,
        "start_beyond": beyond,
        "seconds": 1.0,
    }


def test_lines_of_the_same_network_stay_in_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    for made in (row("zero3", 4), row("fsdp2", 2), row("zero3", 4, held=1.04e9), row("zero3", 4, recompute=False)):
        update(page, "a network:", [line(made)])
    lines = [text.split(" | ")[:3] for text in page.read_text().splitlines() if text.startswith("| ")][1:]
    assert lines == [["| fsdp2", "2", "blocks"], ["| zero3", "4", "weights only"], ["| zero3", "4", "blocks"]]
    assert "| 1.04 |" in page.read_text()
    update(page, "another network:", [line(row("single", 1))])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "another network:" in text and "a network:" not in text and "zero3" not in text


def test_what_is_not_kept_is_said() -> None:
    assert promises(row("fsdp2", 2)) == promises(row("ddp", 2, held=3e9, beyond=9e9)) == []
    (sentence,) = promises(row("zero3", 2, held=1.2e9))
    assert "zero3 on 2 ranks holds 1.20 of its share" in sentence
    (sentence,) = promises(row("fsdp2", 4, beyond=1.2e9))
    assert "fsdp2 on 4 ranks takes 1.20 GB beyond its share and a block to start" in sentence


@pytest.mark.engine
@pytest.mark.slow
def test_fsdp2_and_zero3_hold_their_share(tmp_path: Path):
    command = [sys.executable, "tools/bench/memory.py", "--model", "BiT-S-R50x1", "--classes", "5000", "--ranks", "2"]
    command += ["--engines", "single,fsdp2,zero3", "--checkpointing", "on", "--size", "32", "--steps", "2"]
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "rows.json"), "--write", str(page)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^\| (single|fsdp2|zero3) \|", done.stdout, re.MULTILINE)) == 3
    for text in done.stdout.splitlines():
        assert text in page.read_text().splitlines()
    single, fsdp2, zero3 = json.loads((tmp_path / "rows.json").read_text())
    for row in (fsdp2, zero3):
        assert row["held"] == pytest.approx(row["share"], rel=0.1)
        assert row["loss"] != single["loss"], "the ranks see images of their own"
    assert single["held"] == pytest.approx(single["share"], rel=0.01)
    assert fsdp2["loss"] == pytest.approx(zero3["loss"], rel=1e-5)

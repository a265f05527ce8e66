"""`tools/bench/big_model.py` as it is documented, on a small network: trained, saved, killed, gone on with."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_engine import environment

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from bench.big_model import BEGIN, END, ROOT, _over, update


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/bench/big_model.py", *options]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)


def test_an_engine_that_was_measured_in_the_same_way_keeps_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for engine, peak in (("zero3", "8.63"), ("fsdp2", "7.77"), ("zero3", "8.06")):
        update(page, "a network.", f"ddp is refused, {peak}", [f"| {engine} | {peak} GB | 1.00 GB |"])
    lines = page.read_text().splitlines()
    assert lines[:5] == ["before", BEGIN, "", "a network.", ""] and "old" not in lines
    assert "ddp is refused, 8.06" in lines and "ddp is refused, 7.77" not in lines
    assert [text for text in lines if " GB |" in text] == [
        "| fsdp2 | 7.77 GB | 1.00 GB |",
        "| zero3 | 8.06 GB | 1.00 GB |",
    ]
    update(page, "another.", "ddp would fit", ["| zero3 | 1.00 GB |"])
    assert "fsdp2" not in page.read_text() and page.read_text().endswith(f"{END}\nafter\n")


def test_too_much_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    cells = "4.00 GB | 8.40 GB | 60.0 | 8.86 GB | 50 | 4.50 GB | {} GB | 1.0 / 2.0 |"
    assert not _over([f"| fsdp2 | {cells.format('8.50')}"], 8.5)
    assert _over([f"| fsdp2 | {cells.format('8.50')}", f"| zero3 | {cells.format('8.51')}"], 8.5)
    assert capsys.readouterr().out == "not kept: zero3 took 8.51 GB on a rank, more than 8.5\n"


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

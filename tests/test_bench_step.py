"""What tools/bench/step.py compares computes the same function, and its other benchmarks run in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from bench import all as everything
from bench import scaling, step

from scaletransfer.models.convolution import OnceAStep, StdConv2d
from scaletransfer.models.weights import to_timm

ROOT = Path(__file__).resolve().parents[1]


def _bench(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=250, check=False
    )


def test_timm_and_the_published_way_compute_the_same():
    ours, images = step.wide(1), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours.head.conv.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    theirs = step.timm_wide(1)
    theirs.load_state_dict(to_timm(ours.state_dict()))
    published = step.published(ours)
    assert not any(isinstance(m, StdConv2d) for m in published.modules())
    wanted = ours(images)
    assert wanted.std() > 0.1
    for other in (theirs, published):
        assert torch.allclose(other(images), wanted, atol=1e-3)
    plain = step.unstandardised(ours)
    assert not torch.allclose(plain(images), wanted, atol=1e-1)
    assert len(list(plain.parameters())) == len(list(ours.parameters()))


def test_accumulated_gradients_are_the_sums(monkeypatch):
    monkeypatch.setattr(step, "ACCUMULATED", 2)
    ours, images = step.wide(1).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        ours.head.conv.weight.normal_(generator=torch.Generator().manual_seed(1))
    step.accumulate(ours, images, OnceAStep(ours))
    found = [p.grad.clone() for p in ours.parameters()]
    step.accumulate(ours, images, None)
    for a, p in zip(found, ours.parameters(), strict=True):
        assert float((a - p.grad).norm()) <= 1e-9 * float(p.grad.norm())


def test_exponents_are_those_of_the_power():
    sizes = [10, 100, 1000, 10000]
    assert scaling.exponent(sizes, [3e-5 * size**1.5 for size in sizes], 0) == pytest.approx(1.5)
    assert scaling.exponent(sizes, [0.001, 0.001, 1, 10], 0.5) == pytest.approx(1.0)
    assert scaling.exponent(sizes, [0.0] * 4, 0.5) is None


def test_the_document_says_what_the_files_do():
    machine = {"date": "2026-01-01", "processor": "P", "cores": 2, "load": 0.5, "versions": {"torch": "2"}}
    seconds = {"floor": [0.1, 0.3, 0.2], "SGD_AGC": [0.25, 0.2, 0.15]}
    row = {"model": "M", "layout": "whole", "tensors": 3, "elements": 2_000_000, "seconds": seconds}
    kept = [{"what": "a / b", "wanted": "<= 1.3", "measured": 1.4, "kept": False}]
    command = "python tools/bench/optimizer.py --models M"
    text = everything.document({"optimizer": {"command": command, "machine": machine, "rows": [row], "promises": kept}})
    assert "`python tools/bench/optimizer.py --models M`, 2026-01-01, P, 2 cores" in text
    assert "| M, whole: 3 tensors, 2.0 M | ms, median |" in text
    assert "| SGD_AGC | 200.0 | 150.0 to 250.0 | 1.000 |" in text
    assert "| a / b | <= 1.3 | 1.400 | **not kept** |" in text


@pytest.mark.slow
def test_scaling_runs_in_small(tmp_path):
    done = _bench("tools/bench/scaling.py", "--quick", "--starts", "1", "--json", str(tmp_path / "scaling.json"))
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "scaling.json").read_text())
    assert [row["samples"] for row in written["rows"]] == [1000, 10_000, 100_000, 100_000, 100_000]
    assert all(one["kept"] for one in written["promises"]) and written["command"].startswith("python tools/bench/")


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("options", [[], ["--engine", "zero2"], ["--engine", "fsdp2"]])
def test_optimizer_runs_in_small(options, tmp_path):
    file = tmp_path / "optimizer.json"
    done = _bench("tools/bench/optimizer.py", "--models", "BiT-tiny", "--rounds", "2", "--json", str(file), *options)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [len(row["seconds"]["SGD_AGC"]) for row in rows] == [2] * (1 if options else 2)
    whole = sum(p.numel() for p in step.create_model("BiT-tiny", 1000).parameters())
    assert rows[0]["elements"] == pytest.approx(whole / (2 if options else 1), rel=0.02)

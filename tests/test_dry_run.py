"""``pretrain --dry-run``: the whole run on ranks that are not there, or built and not run; nothing is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers_run import CONFIG, launch_to_end, make_shards, run_single, write_config

from scaletransfer import plan_check, pretrain
from scaletransfer.config import load_config
from scaletransfer.engine.strategy import Strategy
from scaletransfer.fake_ranks import zero3_numbers
from scaletransfer.models import create_model
from scaletransfer.plan_check import check_memory, share_of

pytest_plugins = ("helpers_s3",)

WIDE = CONFIG.replace("global_batch: 16", "global_batch: 64").replace("micro_batch: 4", "micro_batch: 1")
"""64 ranks with one image each; an epoch of the 64 samples is one step."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dry")
    return write_config(folder, make_shards(folder), WIDE)


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def parameters() -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in create_model("BiT-tiny", 13).parameters())


def dry(config: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit status and what was printed; the folder is as it was."""
    before = tree(config.parent)
    status = pretrain.main(["--config", str(config), "--dry-run", *arguments])
    assert tree(config.parent) == before
    return status, capsys.readouterr().out


@pytest.mark.parametrize("engine", ["fsdp2", "hsdp"])
def test_64_fake_ranks_are_built_and_verified(engine: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = dry(config, capsys, "--fake-world", "64", "--engine", engine, "--gpu", "a100-40")
    assert status == 0, out
    lines = {line.split("  ")[1]: line for line in out.splitlines() if line.startswith("  ")}
    assert "64 = 64 ranks x 1 images x 1 micro-batches" in lines["batch"]
    assert "1 steps of 64 samples" in lines["epoch"] and lines["steps"].split()[-1] == "4"
    assert "fp32, fp32 masters" in lines["precision"]
    held = [int(n.replace(",", "")) for n in re.findall(r"rank \d+ +([\d,]+) bytes of parameters.*as planned", out)]
    assert len(held) == 3 and len(set(held)) == 1
    shards = 4 if engine == "hsdp" else 64
    assert 4 * parameters() / shards <= held[0] < 1.2 * 4 * parameters() / shards
    # 4 epochs of a step each, one of them warm-up, peak 0.5 x 64 / 256; the cosine ends at 0
    rates = [float(rate) for rate in re.findall(r"learning rate +([\d.e-]+) in step", out)]
    assert rates == [0.125, pytest.approx(0.125 * 0.75), 0]
    assert "every 4 steps and at the end: 1" in lines["checkpoints"]
    assert "nothing would be refused" in out


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3", "zero3_offload"])
def test_other_engines_on_64_fake_ranks(engine: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = dry(config, capsys, "--fake-world", "64", "--engine", engine)
    assert status == 0, out
    if engine.startswith("zero3"):
        assert "numbers, cut by DeepSpeed's zero.Init: as planned" in out
    else:
        assert "shares computed; this engine does not start on fake ranks" in out
    copied = int(re.findall(r"on the host +([\d,]+) bytes a rank, counted above", out)[0].replace(",", ""))
    assert copied == pytest.approx(8 * parameters() / 64, rel=0.1)
    whole = 4 * parameters()
    momentum = int(re.findall(r"bytes of momentum +([\d,]+)", out)[0].replace(",", ""))
    assert momentum == whole if engine == "ddp" else momentum < whole / 32


def test_zero3_on_fake_ranks_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine where no DeepSpeed ran before, its operator would take a compiler and minutes."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.op_builder import OpBuilder

    def load(builder: OpBuilder, verbose: bool = True) -> None:
        raise AssertionError(f"{builder.name} would be compiled")

    monkeypatch.setattr(OpBuilder, "load", load)
    monkeypatch.setattr(OpBuilder, "jit_load", load)
    numbers = zero3_numbers(lambda: create_model("BiT-tiny", 13), 256, 255)
    assert parameters() / 256 <= numbers < 1.5 * parameters() / 256


@pytest.mark.parametrize(
    ("environment", "engine"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "WORLD_SIZE": "2"}, "zero2"),
        ({"WORLD_SIZE": "2"}, "ddp"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"}, "fsdp2"),
    ],
)
def test_the_launch_file_says_which_engine(
    environment: dict[str, str],
    engine: str,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"ACCELERATE_MIXED_PRECISION": "no", "RANK": "0", **environment}.items():
        monkeypatch.setenv(name, value)
    status, out = dry(config, capsys, "--fake-world", "64")
    assert status == 0 and f"{engine} on 64 fake ranks" in out
    assert "hsdp on 64 fake ranks" in dry(config, capsys, "--fake-world", "64", "--engine", "hsdp")[1]
    monkeypatch.setenv("RANK", "1")
    assert dry(config, capsys, "--fake-world", "64") == (0, "")


def test_what_a_run_goes_on_from_elsewhere_is_checked_and_not_fetched(
    tmp_path: Path, s3, capsys: pytest.CaptureFixture[str]
) -> None:
    """--resume s3://...: on fake ranks and on a real one; nothing is written."""
    config = write_config(tmp_path, make_shards(tmp_path), WIDE)
    quick = ("micro_batch=16", "max_steps=1", "validate.every_epochs=null")
    run_single(config, "name=first", "checkpoint.upload=s3://shards/dry", *quick)
    capsys.readouterr()
    for fake in (["--fake-world", "64"], []):
        status, out = dry(config, capsys, *fake, "--resume", "s3://shards/dry/first", "name=second")
        assert status == 0, out
        assert re.search(r"goes on from +s3://shards/dry/first/step-00000001, step 1$", out, re.MULTILINE), out
        assert re.search(r"steps +4, of which 1 are done$", out, re.MULTILINE), out
        assert "nothing would be refused" in out
    status, out = dry(config, capsys, "--fake-world", "64", "--resume", "s3://shards/dry/first", "name=x", "seed=4")
    assert status == 2 and "was made with seed 3, but this run has 4: a run cannot change it on the way" in out
    status, out = dry(config, capsys, "--fake-world", "64", "--resume", "s3://shards/dry/nobody", "name=x")
    assert status == 2 and "--resume s3://shards/dry/nobody: there is no complete checkpoint (step-*/COMPLETE)" in out
    s3.kill()
    hasty = ("data.remote.attempts=1", "data.remote.timeout=5")
    status, out = dry(config, capsys, "--fake-world", "64", "--resume", "s3://shards/dry/first", "name=x", *hasty)
    assert status == 2 and "s3://shards/dry/first" in out.split("would be refused:")[1]


def test_everything_that_would_be_refused_is_said_at_once(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = dry(config, capsys, "--fake-world", "48", f"run_dir={config}")
    assert status == 2
    refused = out.split("would be refused:\n")[1].splitlines()
    assert "global_batch 64 is not a multiple of ranks x micro_batch = 48 x 1" in refused[0]
    assert f"the run folder {config}/tiny cannot be written ({config} is a file)" in refused[1]
    assert refused[-1] == "dry run: nothing was trained or written"
    status, out = dry(config, capsys, "--fake-world", "64", "--gpu", "cpu:0.001")
    assert status == 2 and "bytes a rank and there are 1,073,741: see scaletransfer plan" in out
    status, out = dry(config, capsys, "--fake-world", "64", "schedule.min_lr=1")
    assert status == 2 and "schedule min_lr 1.0 is above the peak 0.125" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--fake-world", "4"], "--fake-world has a meaning with --dry-run"),
        (["--dry-run", "--engine", "ddp"], "--engine has a meaning with --dry-run --fake-world N only"),
        (["--dry-run", "--fake-world", "0"], "--fake-world is 0: must be at least 1"),
        (["--dry-run", "--fake-world", "2", "--engine", "single"], "--engine single does not run on --fake-world 2"),
        (["--dry-run", "--fake-world", "2", "--engine", "fsdp3"], "there is no 'fsdp3', did you mean fsdp2"),
        (["--dry-ruin"], "unknown option --dry-ruin"),
    ],
)
def test_refused_options(arguments: list[str], sentence: str, config: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        pretrain.main(["--config", str(config), *arguments])


def test_one_real_rank_is_built_and_stops_before_its_first_step(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out = dry(config, capsys)
    assert status == 0
    assert "single (BiT) on 1 ranks, verified as built" in out
    assert "64 = 1 ranks x 1 images x 64 micro-batches" in out
    assert f"{4 * parameters():,} on rank 0, expected {4 * parameters():,}" in out


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_real_ranks_are_built_and_stop_before_their_first_step(config: Path) -> None:
    launched = config.parent / "launched"
    launched.mkdir()
    before = tree(config.parent / "shards")
    run = launch_to_end("fsdp2", ["--config", str(config), "--dry-run"], launched)
    assert "fsdp2 (FSDPBiT) on 2 ranks, verified as built" in run.text()
    assert "64 = 2 ranks x 1 images x 32 micro-batches" in run.text()
    assert tree(config.parent / "shards") == before
    assert not (config.parent / "runs").exists()


def strategy(engine: str, world: int) -> Strategy:
    return Strategy(engine=engine, world=world, rank=0, local_rank=0, local_world=world, cpu=True)


def test_what_certainly_does_not_fit_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """R152x4 on a host of 24 GiB: two ranks of DDP hold 24.8, two of FSDP2 half of that."""
    cfg = load_config(["configs/imagenet21k_bit152x4.yaml"], ["global_batch=8", "micro_batch=2", "precision=fp32"])
    monkeypatch.setattr(plan_check, "installed", lambda: 24 * 2**30)
    monkeypatch.setattr(plan_check, "available", lambda _: 20 * 2**30)
    sentence = r"ddp on 2 ranks holds 12\.4 GiB a rank .*, 24\.7 GiB on this host, which has 24\.0: take an engine that"
    with pytest.raises(ValueError, match=sentence):
        check_memory(cfg, strategy("ddp", 2), 21_842)
    check_memory(cfg, strategy("fsdp2", 2), 21_842)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(plan_check, "available", lambda _: 10 * 2**30)
    check_memory(cfg, strategy("fsdp2", 2), 21_842)
    assert "note: fsdp2 on 2 ranks holds 6.2 GiB a rank" in capsys.readouterr().out
    # the copies for checkpoints, 4.1 GiB a rank, are on the host as well
    monkeypatch.setattr(plan_check, "installed", lambda: 20 * 2**30)
    sentence = r"write checkpoints take 8\.2 GiB on this host beside 12\.4 GiB .*: set checkpoint\.asynchronous=false"
    with pytest.raises(ValueError, match=sentence):
        check_memory(cfg, strategy("fsdp2", 2), 21_842)
    waiting = load_config(
        ["configs/imagenet21k_bit152x4.yaml"],
        ["global_batch=8", "micro_batch=2", "precision=fp32", "checkpoint.asynchronous=false"],
    )
    check_memory(waiting, strategy("fsdp2", 2), 21_842)
    assert share_of(cfg, strategy("zero3", 2), 21_842).momentum == pytest.approx(2 * 1_107_291_730, rel=1e-3)

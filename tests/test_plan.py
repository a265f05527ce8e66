"""The planner's operations, its choices, and what it says."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from scaletransfer import plan
from scaletransfer.config import PretrainConfig, load_config
from scaletransfer.models import BiT, create_model
from scaletransfer.models.convolution import StdConv2d
from scaletransfer.plan_bytes import Estimator, Memory
from scaletransfer.plan_devices import DEVICES, Device, find_device
from scaletransfer.plan_job import make_job
from scaletransfer.plan_time import Time, Traffic
from scaletransfer.plan_trace import Images, flops_per_image
from scaletransfer.plan_zero import ZeroRules

GIB = 2**30
TINY = "configs/chexpert_tiny.yaml"


def network(name: str, checkpointing: bool = False) -> nn.Module:
    made = create_model(name, 10)
    made.set_grad_checkpointing(checkpointing)  # type: ignore[operator]
    return made


def by_hand(made: BiT, size: int, *, checkpointing: bool) -> int:
    """Forward is 2 operations a weight and output pixel; backward twice that, but for the images' own gradient.

    Checkpointing runs every convolution of the body once more.
    """
    operations: dict[str, int] = {}

    def count(name: str, module: nn.Module, output: torch.Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        operations[name] = 2 * module.weight.numel() * output.shape[2] * output.shape[3]

    for name, module in made.named_modules():
        if isinstance(module, (StdConv2d, nn.Conv2d)):
            module.register_forward_hook(lambda m, _, out, name=name: count(name, m, out))
    with torch.no_grad():
        made(torch.zeros(1, 3, size, size))
    again = sum(n for name, n in operations.items() if name.startswith("body."))
    forward = sum(operations.values())
    return 3 * forward - operations["root.conv"] + again * checkpointing


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "size"), [("BiT-tiny", 64), ("BiT-S-R50x1", 64)])
def test_flops_are_those_of_the_flop_counter_on_a_real_step(name: str, size: int, checkpointing: bool) -> None:
    planned = flops_per_image(lambda: network(name, checkpointing), Images(channels=3, size=size, device_type="cpu"))
    made = network(name, checkpointing)
    with FlopCounterMode(display=False) as counter:
        made(torch.zeros(2, 3, size, size)).sum().backward()
    assert planned == counter.get_total_flops() / 2
    assert planned == by_hand(network(name), size, checkpointing=checkpointing)  # type: ignore[arg-type]


def test_forward_of_r50_is_the_published_number_of_operations() -> None:
    """4.1 billion multiply-adds at 224 pixels (He et al. 2016, arXiv 1512.03385, table 1, has 3.8)."""
    found = flops_per_image(lambda: network("BiT-S-R50x1"), Images(channels=3, size=224, device_type="cpu"))
    assert 3.8e9 < found / 6 < 4.4e9


def configuration(*overrides: str) -> PretrainConfig:
    return load_config(["configs/imagenet21k_bit152x4.yaml"], overrides)


@pytest.fixture(scope="module")
def pair() -> plan.Plan:
    """R152x4 with 21,843 classes on 2 ranks of a machine with 24 GiB and no GPU."""
    cfg = configuration("data.image_size=64", "global_batch=8", "micro_batch=2", "checkpoint.asynchronous=false")
    return plan.make_plan(cfg, find_device("cpu:12"), nodes=1, per_node=2, classes=21_843)


def test_ddp_of_r152x4_is_refused_on_two_ranks_of_12_gib_with_the_numbers(pair: plan.Plan) -> None:
    ddp, fsdp2 = pair.row("ddp"), pair.row("fsdp2")
    assert not ddp.fits and ddp.certain and ddp.advice is None
    assert ddp.memory is not None and fsdp2.memory is not None
    state = 4 * pair.parameters
    assert ddp.memory.parameters == ddp.memory.gradients == ddp.memory.momentum == state
    assert 3 * state > 12 * GIB
    assert fsdp2.fits and fsdp2.memory.total < 12 * GIB
    assert fsdp2.memory.parameters == pytest.approx(state / 2, rel=1e-3)
    assert pair.row("zero3").fits
    assert pair.recommended == "fsdp2"
    text = plan.show(pair)
    assert f"ddp does not fit: it needs {ddp.memory.total / GIB:.2f} GiB of 12.00" in text
    assert f"{3 * state / GIB:.2f} of them parameters, gradients and momentum, whatever the micro-batch" in text


def test_where_the_copy_for_checkpoints_is_too_much_waiting_for_them_is_advised() -> None:
    """Weights and momentum of a half of R152x4 in float32, 4.1 GiB, in the memory that is trained in."""
    cfg = configuration("data.image_size=64", "global_batch=8", "micro_batch=2")
    found = plan.make_plan(cfg, find_device("cpu:12"), nodes=1, per_node=2, classes=21_843, engines=("fsdp2",))
    row = found.row("fsdp2")
    assert row.memory is not None and row.advice is not None and not row.fits
    assert row.memory.copy == pytest.approx(8 * found.parameters / 2, rel=1e-3)
    assert row.advice.total == row.memory.total - row.memory.copy < 12 * GIB
    assert "no engine fits as configured; fsdp2 fits with checkpoint.asynchronous=false." in plan.show(found)


def test_zero3_of_r152x4_fits_two_ranks_of_12_gib_with_small_buffers_only() -> None:
    """DeepSpeed's defaults, meant for large GPUs, take 2 GB of bucket and keep half of this network whole."""
    cfg = configuration("data.image_size=64", "global_batch=8", "micro_batch=2", "checkpoint.asynchronous=false")
    job = make_job(cfg, 21_843, world=2, per_node=2, precision="fp32", device_type="cpu")
    small = ZeroRules(
        reduce_bucket_size=50_000_000,
        stage3_prefetch_bucket_size=0,
        stage3_max_reuse_distance=0,
        sub_group_size=50_000_000,
    )
    totals = [
        Estimator(dataclasses.replace(job, zero=rules)).memory("zero3", 2).total / GIB for rules in (ZeroRules(), small)
    ]
    assert totals[1] < 12 < totals[0]


def test_what_does_not_fit_gets_a_micro_batch_that_does() -> None:
    cfg = load_config(
        [TINY], ["global_batch=64", "micro_batch=32", "data.image_size=128", "validate.every_epochs=null"]
    )
    ample = plan.make_plan(cfg, find_device("cpu:8"), nodes=1, per_node=2, engines=("ddp", "fsdp2"))
    full = ample.row("ddp").memory
    assert full is not None and ample.recommended == "ddp" and ample.row("ddp").fits
    tight = plan.make_plan(
        cfg, find_device(f"cpu:{0.8 * full.total / GIB}"), nodes=1, per_node=2, engines=("ddp", "fsdp2")
    )
    row = tight.row("ddp")
    assert not row.fits and not row.certain and row.advice is not None
    assert row.advice.total <= tight.device.usable
    assert 64 // 2 % row.advice.micro_batch == 0
    again = plan.make_plan(
        load_config(
            [TINY],
            [
                "global_batch=64",
                f"micro_batch={row.advice.micro_batch}",
                "data.image_size=128",
                f"model.activation_checkpointing={str(row.advice.activation_checkpointing).lower()}",
            ],
        ),
        tight.device,
        nodes=1,
        per_node=2,
        engines=("ddp",),
    ).row("ddp")
    assert again.fits and again.memory is not None and again.memory.total == row.advice.total
    assert tight.recommended is not None and "no engine fits as configured" in tight.reason


def test_time_is_the_larger_of_computing_and_sending() -> None:
    cfg = load_config([TINY], ["global_batch=64", "micro_batch=8"])
    quick = find_device("h100-80")
    slow = Device(**{**vars(quick), "link": 1e6, "network": 1e6})
    one, other = (plan.make_plan(cfg, d, nodes=2, per_node=4, engines=("ddp",)).row("ddp").time for d in (quick, slow))
    assert one is not None and other is not None
    assert one.compute == other.compute and one.update == other.update
    assert other.bound == "links" and other.step == other.communication + other.update > one.step
    # a GPU sends 2 x 7/8 of the gradients, over its links to the node and to others at once
    parameters = plan.make_plan(cfg, quick, nodes=2, per_node=4, engines=()).parameters
    assert other.communication == pytest.approx(2 * 7 / 8 * 4 * parameters / 2e6, rel=1e-6)
    # with quick links inside, what leaves a node of four GPUs counts: 2 x 1/2 of the gradients, over four adapters
    far = Device(**{**vars(quick), "network": 1e6})
    leaving = plan.make_plan(cfg, far, nodes=2, per_node=4, engines=("ddp",)).row("ddp").time
    assert leaving is not None and leaving.communication == pytest.approx(4 * parameters / 4e6, rel=1e-6)


def row(engine: str, seconds: float | None, *, fits: bool = True, micro: int | None = None, state: int = 1) -> plan.Row:
    time = None if seconds is None else Time(compute=seconds, communication=0.0, update=0.0)
    changes = f"micro_batch={micro}"
    advice = None
    if micro is not None:
        advice = plan.Advice(
            micro_batch=micro, activation_checkpointing=True, asynchronous=True, total=1, changes=changes
        )
    return plan.Row(
        engine=engine,
        impossible=None,
        memory=Memory(moment="backward", parameters=GIB, gradients=0, momentum=0),
        state=state,
        fits=fits,
        certain=state > GIB,
        traffic=Traffic(near=round(1e9 * (seconds or 1))),
        time=time,
        advice=advice,
    )


H100 = DEVICES["h100-80"]


@pytest.mark.parametrize(
    ("rows", "nodes", "expected"),
    [
        # what milliseconds say is noise, and so is a tenth
        ([row("ddp", 0.003), row("zero3", 0.001)], 8, "ddp"),
        ([row("ddp", 1.09), row("fsdp2", 1.0)], 1, "ddp"),
        ([row("ddp", 1.2), row("fsdp2", 1.0), row("hsdp", 1.01)], 1, "fsdp2"),
        ([row("ddp", 1.2), row("fsdp2", 1.0), row("hsdp", 1.01)], 8, "hsdp"),
        ([row("ddp", 1.2, fits=False), row("zero2", 1.0), row("zero3_offload", 0.5)], 1, "zero2"),
        ([row("ddp", 1.2, fits=False), row("zero3_offload", 0.5)], 1, "zero3_offload"),
        ([row("ddp", 1.0, fits=False, micro=2), row("fsdp2", 1.0, fits=False, micro=8)], 1, "fsdp2"),
        ([row("fsdp2", 1.0, fits=False, micro=2), row("zero3_offload", 1.0, fits=False, micro=8)], 1, "fsdp2"),
        # one GPU of many is no way to train
        ([row("single", 0.1), row("ddp", 1.0)], 1, "ddp"),
    ],
)
def test_what_an_expert_would_take(rows: list[plan.Row], nodes: int, expected: str) -> None:
    assert plan.recommend(rows, H100, 8 * nodes, nodes)[0] == expected


def test_where_nothing_fits_the_sentence_says_what_to_change() -> None:
    engine, why = plan.recommend([row("ddp", 1.0, fits=False), row("fsdp2", 1.0, fits=False)], H100, 8)
    assert engine is None and "smaller images (data.image_size)" in why
    rows = [row("ddp", 1.0, fits=False, state=90 * GIB), row("fsdp2", 1.0, fits=False, state=80 * GIB)]
    engine, why = plan.recommend(rows, H100, 8)
    assert engine is None and "80.0 of 77.4 GiB a GPU under fsdp2, which splits most: more GPUs" in why


def test_one_gpu_may_offload_and_hybrid_shards_are_named_in_the_command() -> None:
    cfg = load_config([TINY], ["global_batch=64", "micro_batch=8"])
    alone = plan.make_plan(cfg, H100, nodes=1, per_node=1, engines=("single", "ddp", "zero3_offload"))
    assert alone.recommended == "single" and alone.row("ddp").impossible is not None
    offloaded = alone.row("zero3_offload")
    assert offloaded.memory is not None and offloaded.traffic is not None
    assert offloaded.traffic.total == 0 < offloaded.traffic.host
    # masters, gradients twice, momentum and bf16 weights; and the copy for checkpoints, rounded up
    assert offloaded.memory.host > 18 * alone.parameters * 0.9
    hybrid = plan.make_plan(cfg, H100, nodes=1, per_node=8, engines=("hsdp",))
    assert (
        "--num_processes 8 --parallelism_config_dp_replicate_size 2 --parallelism_config_dp_shard_size 4"
        in plan.show(hybrid)
    )
    many = plan.make_plan(cfg, H100, nodes=2, per_node=4, engines=("hsdp",))
    assert "sbatch --nodes=2 --gpus-per-node=4 launch/slurm/pretrain.sbatch hsdp --config" in plan.show(many)


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert plan.main(arguments) == 0
    return capsys.readouterr().out


def test_json_and_table_have_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--config", TINY, "--nodes", "2", "--gpus-per-node", "4", "--gpu", "a100-40", "global_batch=64")
    found: dict[str, Any] = json.loads(command(capsys, *arguments, "--json"))
    lines = command(capsys, *arguments).splitlines()
    assert [row["engine"] for row in found["rows"]] == list(plan.ENGINES)
    title = next(line for line in lines if line.startswith("GiB a GPU"))
    start = lines.index(title)
    for number, row in enumerate(found["rows"], start + 1):
        cells = lines[number].split()
        assert cells[0] == row["engine"]
        assert f"{row['memory']['total'] / GIB:.4f}" in cells or f"{row['memory']['total'] / GIB:.2f}" in cells
        assert len(lines[number]) == len(title)
    assert found["classes"] == 13 and found["classes_from"] == "data.expect_labels"
    assert math.isclose(found["device"]["usable"] / GIB, 40 * 0.98 - 1)


def test_every_figure_has_a_source() -> None:
    for device in DEVICES.values():
        assert "data sheet" in device.source
        assert 0 < device.usable < device.memory
        assert min(device.bf16, device.fp32, device.memory_speed, device.link, device.network) > 0
        assert device.link > device.host_link > 0 and device.bf16 >= device.fp32


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpu", "b300"], "--gpu b300: there are v100-32, .* and cpu:GIB"),
        (["--gpu", "cpu"], "write cpu:GIB"),
        (["--gpu", "cpu:nan"], "write cpu:GIB"),
        (["--network", "0"], "--network 0: must be"),
        (["--nodes", "0"], "--nodes is 0: must be at least 1"),
        (["--nodes", "3"], "global_batch 32 is not a multiple of ranks x micro_batch = 12 x 8"),
        (["data.expect_labels=null"], "how many classes there are is not known: .* give --classes N"),
        (["--gpus", "4"], "there is no option --gpus, did you mean --gpu"),
    ],
)
def test_refusals(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as refusal:
        plan.main(["--config", TINY, *arguments])
    assert "\n" not in str(refusal.value)


def test_classes_of_shards_are_counted(tmp_path: Path) -> None:
    from helpers_run import make_shards, write_config

    path = write_config(tmp_path, make_shards(tmp_path, rows=16, valid=3))
    cfg = load_config([path])
    found = plan.make_plan(cfg, find_device("cpu:8"), nodes=1, per_node=1, engines=())
    assert (found.classes, found.classes_from) == (13, f"of {tmp_path / 'shards'}")
    with pytest.raises(ValueError, match=r"--classes is 5 but the shards of data\.train have 13"):
        plan.make_plan(cfg, find_device("cpu:8"), nodes=1, per_node=1, classes=5)

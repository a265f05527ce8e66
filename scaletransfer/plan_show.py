"""A plan as text for a terminal: one aligned table, then notes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from scaletransfer.plan_devices import Device

if TYPE_CHECKING:
    from scaletransfer.plan import Plan, Row

WIDTH = 118
COLUMNS = (
    "parameters",
    "gradients",
    "momentum",
    "standardised",
    "activations",
    "gathered",
    "buckets",
    "update",
    "copy",
)


def show(plan: Plan) -> str:
    """The whole text."""
    return "\n".join([*head(plan), "", *table(plan), "", *notes(plan)])


def head(plan: Plan) -> list[str]:
    """What is planned."""
    checkpointing = "with" if plan.activation_checkpointing else "without"
    each = f"{plan.world} ranks x {plan.micro_batch} images x {plan.accumulation} micro-batches"
    return [
        f"{plan.model}: {plan.parameters:,} parameters, {plan.classes:,} classes ({plan.classes_from}); images of "
        f"{plan.image_size} x {plan.image_size} x {plan.channels}",
        f"{plan.precision}, {checkpointing} activation checkpointing; {plan.flops_per_image / 1e9:.4g} GFLOP an image "
        "forward and backward",
        f"{plan.nodes} node(s) x {plan.gpus_per_node} {plan.device.name}, {gib(plan.device.usable)} GiB each for "
        f"training; global batch {plan.global_batch} = {each}",
    ]


def table(plan: Plan) -> list[str]:
    """One line an engine. Columns of memory that are empty everywhere are left out."""
    shown = [c for c in COLUMNS if any(row.memory and getattr(row.memory, c) for row in plan.rows)]
    host = any(row.memory and row.memory.host for row in plan.rows)
    titles = ["GiB a GPU", *shown, "total", "fullest in", "fits", "GB sent", "s at least", "bound by"]
    lines = [titles + (["on the host"] if host else [])]
    lines += [_line(row, shown, host) for row in plan.rows if row.impossible is None]
    text = aligned(lines)
    return text + [f"{row.engine}: {row.impossible}" for row in plan.rows if row.impossible is not None]


def _line(row: Row, shown: Sequence[str], host: bool) -> list[str]:
    assert row.memory is not None and row.traffic is not None
    cells = [row.engine, *(gib(getattr(row.memory, c)) for c in shown), gib(row.memory.total), row.memory.moment]
    cells += ["yes" if row.fits else "NO", f"{row.traffic.total / 1e9:.2f}"]
    cells += ["-", "-"] if row.time is None else [f"{row.time.step:.3f}", row.time.bound]
    return cells + ([gib(row.memory.host)] if host else [])


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def gib(size: int) -> str:
    """Bytes as GiB with so many digits that small networks show something."""
    value = size / 2**30
    return "0" if size == 0 else f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def notes(plan: Plan) -> list[str]:
    """The recommendation first, then what would fit, then what the numbers mean."""
    found = []
    if plan.recommended is None:
        found.append(f"Recommended: none; {plan.reason}.")
    else:
        found.append(f"Recommended: {plan.recommended}: {plan.reason}.")
        found.append(f"  {command(plan)}")
    for row in plan.rows:
        if row.impossible is None and not row.fits:
            found.append(f"{row.engine} does not fit: {_instead(row, plan.device)}.")
    found.append("")
    for text in _meaning(plan):
        found += textwrap.wrap(text, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    return found


def command(plan: Plan) -> str:
    """How to start what is recommended."""
    assert plan.recommended is not None
    if plan.nodes > 1:
        return (
            f"sbatch --nodes={plan.nodes} --gpus-per-node={plan.gpus_per_node} launch/slurm/pretrain.sbatch "
            f"{plan.recommended} --config ..."
        )
    options = f"--num_processes {plan.world}"
    if plan.recommended == "hsdp":
        options += f" --parallelism_config_dp_replicate_size {plan.world // plan.shards}"
        options += f" --parallelism_config_dp_shard_size {plan.shards}"
    return (
        f"accelerate launch --config_file launch/{plan.recommended}.yaml {options} -m scaletransfer.pretrain "
        "--config ..."
    )


def _instead(row: Row, device: Device) -> str:
    assert row.memory is not None
    needs = f"it needs {gib(row.memory.total)} GiB of {gib(device.usable)}"
    if row.certain:
        return f"{needs}, {gib(row.state)} of them parameters, gradients and momentum, whatever the micro-batch"
    if row.advice is None:
        return f"{needs}, also with one image a micro-batch"
    return f"{needs}; {row.advice.changes} would take {gib(row.advice.total)}"


def _meaning(plan: Plan) -> list[str]:
    device = plan.device
    found = [
        "parameters: with float32 masters where the engine keeps them beside others. standardised: weights that are "
        "standardised once for all micro-batches of a step. activations: with what convolutions copy. gathered: "
        "parameters and gradients that are whole for a while. buckets: of communication. update: the optimizer's "
        "copies. All at the moment of a step that is the fullest; total has 5 % on activations for what an allocator "
        "cannot use. single runs on one GPU, whatever their number.",
        "copy, or on the host, for each GPU: what checkpoints are copied to before they are written (none with "
        "checkpoint.asynchronous=false); under zero3_offload also what is offloaded.",
        "sent: bytes that one GPU sends in a step, by ring algorithms.",
    ]
    if any(row.impossible is None and row.engine == "hsdp" for row in plan.rows):
        found.append(f"hsdp: {plan.world // plan.shards} copies, each split over {plan.shards} GPUs.")
    if device.kind == "cpu":
        return [*found, "No time is given for a CPU: no data sheet says it."]
    peak, kind = (device.bf16, "bf16") if plan.precision == "bf16" else (device.fp32, "fp32, TF32 where there is")
    found.append(
        "s at least: the larger of computing and sending, then the update, at peak speed: "
        f"{peak / 1e12:g} TFLOP/s ({kind}), "
        f"memory {device.memory_speed / 1e12:g} TB/s, {device.link / 1e9:g} GB/s a GPU to its node, "
        f"{device.network / 1e9:g} GB/s a GPU to other nodes, {device.host_link / 1e9:g} GB/s to its host. Assumed, "
        f"not measured ({device.source}): real steps take longer."
    )
    return found

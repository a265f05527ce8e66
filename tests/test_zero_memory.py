"""What ZeRO holds beyond a rank's shares; whole runs of it are in test_engine_parity and the bench."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scaletransfer.engine.zero_memory import BUFFER, buffer_settings, forget_gradients, shared_masters


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("elements", [1, 1000, 40_000_001])
def test_forgotten_gradients_are_zeros_and_take_no_memory(elements: int):
    buffer = torch.ones(elements)
    views = buffer.narrow(0, elements // 3, elements - elements // 3)
    before = resident()
    forget_gradients(SimpleNamespace(grad_partitions_flat_buffer=buffer))
    if elements > 1_000_000:
        assert before - resident() > 3.8 * elements
    if elements > 2048:  # less than a page stays as it is
        assert not buffer.any() and not views.any()
    views[-1] = 3.0
    assert buffer[-1] == 3.0


def test_masters_in_float32_are_the_partitions_and_others_are_copies(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    monkeypatch.setattr("deepspeed.runtime.zero.stage3.print_rank_0", lambda *_, **__: None)  # there are no ranks
    same, half = torch.arange(5.0), torch.arange(5, dtype=torch.bfloat16)
    zero = SimpleNamespace(
        fp16_partitioned_groups_flat=[same, half],
        fp16_partitioned_groups_flat_numel=[5, 5],
        fp16_partitioned_groups_flat_id=[[0], [1]],
        fp32_partitioned_groups_flat=[],
        master_weights_and_grads_dtype=torch.float32,
        device="cpu",
        offload_optimizer=False,
        params_in_nvme_and_cpu=False,
        _swappable_optimizer_subgroup=lambda number: False,
        _create_momentum_buffer=lambda *_: None,
        optimizer=SimpleNamespace(param_groups=[]),
    )
    before = Stage3._create_fp32_partitions
    with shared_masters():
        Stage3._create_fp32_partitions(zero)
    assert Stage3._create_fp32_partitions is before and zero.device == "cpu"
    masters = zero.fp32_partitioned_groups_flat
    assert masters[0].data_ptr() == same.data_ptr() and masters[0].requires_grad
    assert masters[1].data_ptr() != half.data_ptr() and masters[1].dtype == torch.float32
    zero.fp32_partitioned_groups_flat = []
    Stage3._create_fp32_partitions(zero)
    assert zero.fp32_partitioned_groups_flat[0].data_ptr() != same.data_ptr(), "DeepSpeed needs no help any more"


def test_buffers_are_bounded_in_every_stage():
    for stage in (1, 2, 3):
        settings = buffer_settings(stage)
        assert settings["reduce_bucket_size"] == BUFFER
        assert ("stage3_max_live_parameters" in settings) == (stage == 3)

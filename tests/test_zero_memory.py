"""What ZeRO holds beyond a rank's shares; whole runs of it are in test_engine_parity and the bench."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scaletransfer.engine.zero_memory import (
    BUFFER,
    bound_norms,
    buffer_settings,
    forget_gradients,
    give_gradients_in_place,
    shared_masters,
)
from scaletransfer.units import CHUNK, square_norm


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
    for stage, cpu in itertools.product((1, 2, 3), (True, False)):
        settings = buffer_settings(stage, cpu=cpu)
        assert settings["reduce_bucket_size"] == BUFFER
        assert settings.get("stage3_prefetch_bucket_size", 0) == (0 if cpu or stage < 3 else BUFFER // 2)
        assert ("stage3_max_live_parameters" in settings) == (stage == 3)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch):
    """DeepSpeed's stage 3, whose collectives are those of one rank."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero import stage3

    monkeypatch.setattr(stage3.dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(stage3.dist, "all_reduce", lambda *_, **__: None)
    return stage3.DeepSpeedZeroOptimizer_Stage3


@pytest.mark.parametrize("stage", ["1 and 2", "3"])
def test_deepspeeds_norm_is_the_same_and_makes_no_large_copies(alone, stage: str, monkeypatch: pytest.MonkeyPatch):
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    kind = alone if stage == "3" else DeepSpeedZeroOptimizer
    zero = SimpleNamespace(
        device=torch.device("cpu"),
        dp_process_group=None,
        model_parallel_rank=0,
        _assert_same_partition_group=lambda params: None,
        _get_param_partition_group=lambda param: None,
        _grad_norm_counts_every_rank=lambda params, group: True,
        _model_parallel_all_reduce=lambda tensor, op: None,
        _autoep_expert_parallel_group=lambda params: None,
    )
    zero.get_grad_norm_direct = lambda *given: kind.get_grad_norm_direct(zero, *given)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(3 * CHUNK + 5, generator=generator), torch.randn(7, generator=generator)]
    params = [torch.zeros(1), torch.zeros(1)]
    plain = float(zero.get_grad_norm_direct(gradients, params))
    copies: list[int] = []
    to = torch.Tensor.to

    def counted(tensor: torch.Tensor, *given, **named):
        copies.append(tensor.numel())
        return to(tensor, *given, **named)

    bound_norms(zero)
    if stage != "3":  # where padding may stand between
        padding = torch.ones(9)
        padding._zero_padding = True
        gradients.insert(1, padding)
    with monkeypatch.context() as inside:
        inside.setattr(torch.Tensor, "to", counted)
        assert float(zero.get_grad_norm_direct(gradients, params)) == pytest.approx(plain, rel=1e-7)
    assert max(copies) == CHUNK and sum(n > 1 for n in copies) >= 5
    gradients[0][CHUNK] = float("nan")
    assert float(zero.get_grad_norm_direct(gradients, params)) == -1


def test_a_sub_groups_gradients_are_given_where_they_lie(alone):
    buffer = torch.arange(12.0)
    master = torch.zeros(7)
    zero = SimpleNamespace(
        flatten=lambda tensors: torch.cat([tensor.flatten() for tensor in tensors]),
        averaged_gradients={0: [buffer[2:5], buffer[5:9]]},
        fp32_partitioned_groups_flat=[master],
        _get_sub_group_process_group=lambda number: None,
    )
    give_gradients_in_place(zero)
    alone._prepare_fp32_grad_for_sub_group(zero, 0)
    assert master.grad.tolist() == buffer[2:9].tolist() and master.grad.data_ptr() == buffer[2:].data_ptr()
    for apart in ([buffer[2:5], buffer[6:10]], [buffer[5:9], buffer[2:5]], [buffer[2:9:2], buffer[9:12]]):
        zero.averaged_gradients, master.grad = {0: apart}, None
        alone._prepare_fp32_grad_for_sub_group(zero, 0)
        assert master.grad.tolist() == torch.cat(apart).tolist()
        assert master.grad.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr()


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 3, 4, 5), (CHUNK + 1, 2)])
def test_squares_are_summed_in_float64(shape: tuple[int, ...]):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert float(square_norm(values)) == pytest.approx(float(values.double().square().sum()), rel=1e-12)
    if len(shape) == 4:
        last = values.to(memory_format=torch.channels_last)
        assert float(square_norm(last)) == pytest.approx(float(values.double().square().sum()), rel=1e-12)

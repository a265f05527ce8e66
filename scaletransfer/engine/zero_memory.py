"""What keeps DeepSpeed's memory near a rank's shares: sizes of its buffers, and two things that it leaves to do."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from scaletransfer.units import chunks

BUFFER = 50_000_000
"""Elements of a communication buffer (200 MB in float32): a few units of R152x4. DeepSpeed's default is ten times that,
and as many live parameters as R152x4 has, so that it would never let go of one."""


def buffer_settings(stage: int, *, cpu: bool) -> dict[str, Any]:
    """The part ``zero_optimization`` of DeepSpeed's configuration that bounds what is held beyond a rank's shares.

    On CPUs nothing is fetched ahead: what would be sent meanwhile waits for the cores that compute, and each block that
    is there before its turn is memory.

    See https://www.deepspeed.ai/docs/config-json/#zero-optimizations-for-fp16-training for each.
    """
    found: dict[str, Any] = {"reduce_bucket_size": BUFFER}
    if stage < 3:
        return {**found, "allgather_bucket_size": BUFFER}
    return {
        **found,
        "stage3_prefetch_bucket_size": 0 if cpu else BUFFER // 2,
        # A parameter whose next use is further away than that is given up, and gathered again.
        "stage3_max_live_parameters": 2 * BUFFER,
        "stage3_max_reuse_distance": 2 * BUFFER,
        # The optimizer steps so many of a rank's own parameters at a time; weight decay copies their gradients.
        "sub_group_size": BUFFER,
    }


@contextmanager
def shared_masters() -> Iterator[None]:
    """ZeRO-3 optimizers made inside take float32 partitions as the masters themselves.

    DeepSpeed 0.19 means to do so, but compares a device with its name, which is never equal, and would clone them all.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    create = Stage3._create_fp32_partitions

    def with_device(zero: Any) -> None:
        name = zero.device
        zero.device = torch.device(name)
        try:
            create(zero)
        finally:
            zero.device = name

    Stage3._create_fp32_partitions = with_device
    try:
        yield
    finally:
        Stage3._create_fp32_partitions = create


def bound_norms(zero: Any) -> None:
    """Let DeepSpeed take its gradient norm chunk by chunk; the number is the same.

    It makes a float64 copy of each partition of a gradient for that: of the head of R152x4 with 21,842 classes on two
    ranks 0.7 GB, at the step's fullest moment. Chunks that stay in a CPU's cache also take a third of the time.
    """
    take = getattr(zero, "get_grad_norm_direct", None)
    if take is None:  # ZeRO-1 in bf16: it takes the norm of all gradients at once, which are float32 already
        return

    def by_chunks(gradients: Iterable[Tensor], params: Iterable[Tensor], norm_type: float = 2) -> Tensor:
        real = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
        pairs = [(part, p) for g, p in zip(real, params, strict=False) for part in chunks(g)]
        return take([part for part, _ in pairs], [p for _, p in pairs], norm_type)  # type: ignore[no-any-return]

    zero.get_grad_norm_direct = by_chunks


def give_gradients_in_place(zero: Any) -> None:
    """Let ZeRO-3 give the optimizer a sub-group's gradients where they lie, which is side by side in one buffer.

    It copies them together: of the head of R152x4 with 21,842 classes on two ranks 0.36 GB.
    """
    copy = zero.flatten

    def flatten(tensors: Sequence[Tensor]) -> Tensor:
        first, end = tensors[0], tensors[0].data_ptr()
        for tensor in tensors:
            if not tensor.is_contiguous() or tensor.dtype != first.dtype or tensor.data_ptr() != end:
                return copy(tensors)  # type: ignore[no-any-return]
            end += tensor.numel() * tensor.element_size()
        if first.untyped_storage().data_ptr() + first.untyped_storage().nbytes() < end:
            return copy(tensors)  # type: ignore[no-any-return]  # neighbours by chance
        return first.as_strided((sum(tensor.numel() for tensor in tensors),), (1,))

    zero.flatten = flatten


def forget_gradients(zero: Any) -> None:
    """Give the memory of ZeRO-3's gradients back between steps, on CPUs; the buffer reads as zeros until written.

    Other engines free gradients after the step; DeepSpeed keeps one buffer for ever, so that they would be there
    beside the whole gradient of the head, which is the largest tensor where there are many classes.
    """
    buffer = zero.grad_partitions_flat_buffer
    if buffer is None or buffer.device.type != "cpu" or buffer.is_pinned():
        return
    page, begin, size = mmap.PAGESIZE, buffer.data_ptr(), buffer.element_size()
    first = -(-begin // page) * page
    length = (begin + buffer.numel() * size) // page * page - first
    if length <= 0:
        return
    # the ends share their pages with other memory
    buffer[: (first - begin) // size].zero_()
    buffer[(first + length - begin) // size :].zero_()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "the memory of gradients could not be given back (madvise)")

"""What a training step allocates and frees, in order, found on fake tensors: shapes and types without values.

`record` runs forward and backward of a network in a ledger that sees every storage come and go, those of recomputed
blocks included. Nothing is allocated, and no accelerator has to be there. FSDP2 makes and drops its gathered blocks by
resizing storages, which the ledger sees as well.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from scaletransfer.models.convolution import without_products
from scaletransfer.units import local

CONVOLUTION_COPIES = 1
"""Copies of all operands (input, weight, output, and their gradients) that a convolution makes while it runs. cuDNN's
tensor-core kernels and oneDNN's want another order of dimensions than PyTorch's default and reorder in a workspace
(NVIDIA, Convolutional Layers User's Guide, "Tensor Layouts in Memory"; oneDNN, "Memory Format Propagation")."""

_CUDA_FLOAT32 = (
    "group_norm",
    "layer_norm",
    "rms_norm",
    "softmax.int",
    "log_softmax.int",
    "softplus",
    "pow.Tensor_Scalar",
)
"""What autocast runs in float32 on CUDA (ATen/autocast_mode.h, AT_FORALL_FP32 and its variants), of what networks use
between layers. On CPU it leaves these operations as they are, so that the same network keeps less there."""


@contextmanager
def fake_network(create: Callable[[], nn.Module]) -> Iterator[nn.Module]:
    """The network that `create` makes, of fake tensors, ready to train.

    It is born on ``meta`` and not fake: some networks read numbers from small tensors while they are made.
    """
    with torch.device("meta"):
        network = create().train()
    with FakeTensorMode():
        fakes: dict[int, Any] = {}  # a tensor that two modules share stays shared
        for module in network.modules():
            for owned in (module._parameters, module._buffers):
                for name, born in owned.items():
                    if born is not None and id(born) not in fakes:
                        fake = torch.empty_strided(born.shape, born.stride(), dtype=born.dtype)
                        trained = isinstance(born, nn.Parameter)
                        fakes[id(born)] = nn.Parameter(fake, born.requires_grad) if trained else fake
                    owned[name] = fakes.get(id(born))
        yield network


def record(
    network: nn.Module,
    micro_batch: int,
    channels: int,
    size: int,
    *,
    bf16: bool,
    device_type: str,
    gradients: Literal["there", "new", "taken"] = "there",
    kept: float = 0.0,
) -> tuple[list[int], int]:
    """Run forward and backward of one micro-batch.

    Args:
        network: of fake tensors; a real one would be trained for real, with the same result.
        micro_batch, channels, size: uint8 images [micro_batch, channels, size, size], made float32 on the device.
        bf16: forward runs under autocast; device_type: by the rules of this device, "cuda" or "cpu".
        gradients: "there": it is not the first micro-batch of its step, and is added to what the others left.
            "new": it is the first one, and gradients come into being. "taken": whoever runs the network takes each
            gradient away when it is made, as DeepSpeed does.
        kept: the share of each gradient for which that one needs memory from then on; negative where it frees some.

    Returns:
        The bytes of each storage as it is made (positive) and freed (negative), without those of parameters, buffers
        and gradients that were there; and the index of the last one in forward: the sum up to there is what backward
        needs.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.empty_like(p) if gradients == "there" else None
    known = [p.grad for p in trained if p.grad is not None]
    ledger = _Ledger([*network.parameters(), *network.buffers(), *known])
    take = partial(_take, ledger, kept)
    hooks = [p.register_post_accumulate_grad_hook(take) for p in trained if gradients == "taken"]
    collecting = gc.isenabled()
    gc.disable()  # or cycles would end at another place of each run
    try:
        # Rules of CUDA in backward too, where checkpointed blocks run again under autocast.
        # A convolution of every size, as what is traced is to hold for other micro-batches.
        with without_products(), ledger, _cuda_autocast() if device_type == "cuda" else nullcontext():
            raw = torch.empty(micro_batch, channels, size, size, dtype=torch.uint8)
            images = raw.float()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                logits = network(images)
            mark = len(ledger.changes) - 1
            logits.float().sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
        if collecting:
            gc.enable()
    return ledger.changes, mark


def _take(ledger: _Ledger, kept: float, parameter: Tensor) -> None:
    parameter.grad = None
    ledger.changes.append(math.ceil(kept * size_of(parameter)))


@contextmanager
def _cuda_autocast() -> Iterator[None]:
    """Autocast on CPU gives operations the float32 inputs that it would give them on CUDA.

    Fake tensors can be on a CUDA device that is not there, but autograd then has no thread for their backward.
    """
    rules = torch.library.Library("aten", "IMPL")

    def in_float32(operation: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, lambda t: t.float() if t.dtype == torch.bfloat16 else t, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return operation(*args, **kwargs)

    try:
        for name in _CUDA_FLOAT32:
            packet, _, overload = name.partition(".")
            operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
            rules.impl(name, partial(in_float32, operation), "AutocastCPU")
        yield
    finally:
        rules._destroy()


class _Ledger(TorchDispatchMode):
    """Writes into ``changes`` the bytes of each storage that is made (positive) and given back (negative)."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.changes: list[int] = []
        self._sizes: dict[int, int] = {}
        self._living: dict[int, Any] = {}
        for tensor in known:
            self._know(local(tensor).untyped_storage())

    def __enter__(self) -> _Ledger:
        resize, ledger = torch.UntypedStorage.resize_, self

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            ledger._resize(storage, size)
            return resize(storage, size)

        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", resized)
        self._patch.__enter__()
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.__exit__(*error)
        self._living.clear()  # what goes from now on is no part of the micro-batch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in made:
            self._enter(local(tensor).untyped_storage())
        if func in (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default):
            operands = [t for t in tree_leaves(args) if isinstance(t, Tensor)] + made
            workspace = CONVOLUTION_COPIES * sum(size_of(t) for t in operands)
            self.changes += [workspace, -workspace]
        return out

    def _know(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        self._sizes[key] = storage.nbytes()
        self._living[key] = weakref.ref(storage, partial(self._leave, key))

    def _enter(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._living:
            self._know(storage)
            self.changes.append(storage.nbytes())

    def _resize(self, storage: torch.UntypedStorage, size: int) -> None:
        if storage._cdata not in self._living:
            self._know(storage)  # made before the ledger was opened
        before = self._sizes[storage._cdata]
        if size != before:
            self.changes.append(size - before)
            self._sizes[storage._cdata] = size

    def _leave(self, key: int, _: object) -> None:
        del self._living[key]
        self.changes.append(-self._sizes.pop(key))


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor's numbers."""
    return tensor.numel() * tensor.element_size()

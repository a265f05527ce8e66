"""Initial values as a pure function of (seed, tensor name, shape), so that every engine starts equal.

The body's values do not depend on the number of classes, on the order of construction, on the device or on
how many processes hold the model: each tensor has its own generator, seeded from a hash of the seed and its
name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

KINDS = ("uniform", "ones", "zeros", "layer_scale")
_LAYER_SCALE = 1e-5
_BUFFERS: dict[str, tuple[float, torch.dtype]] = {
    "running_mean": (0.0, torch.float32),
    "running_var": (1.0, torch.float32),
    "num_batches_tracked": (0.0, torch.int64),
}


def initial_value(name: str, shape: Sequence[int], kind: str, seed: int, *, fan_in: int | None = None) -> Tensor:
    """The initial CPU float32 tensor of `shape` for the parameter `name`.

    kind "uniform" draws from +-1/sqrt(fan_in) like PyTorch's convolutions and linear layers (`fan_in`:
    product of all dimensions but the first, if not given); "ones", "zeros" and "layer_scale" (1e-5) are
    constant. The generator is torch's CPU Mersenne twister seeded with the first 8 bytes of
    sha256("<seed>/<name>"). Raises ValueError for another kind, and for a 1-D "uniform" without `fan_in`.
    """
    if kind == "uniform":
        if fan_in is None:
            if len(shape) < 2:
                raise ValueError(f"The uniform initial value of {name} needs fan_in, as its shape is {tuple(shape)}.")
            fan_in = math.prod(shape[1:])
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little"))
        bound = 1 / math.sqrt(fan_in)
        # The device is named, as the caller may be inside `with torch.device("meta")`.
        value = torch.empty(tuple(shape), dtype=torch.float32, device="cpu")
        return value.uniform_(-bound, bound, generator=generator)
    constants = {"ones": 1.0, "zeros": 0.0, "layer_scale": _LAYER_SCALE}
    if kind not in constants:
        raise ValueError(f"Initial value of {name}: unknown kind {kind!r}, known are {', '.join(KINDS)}.")
    return torch.full(tuple(shape), constants[kind], dtype=torch.float32, device="cpu")


def initial_tensors(model: nn.Module, seed: int) -> Callable[[str], Tensor]:
    """A function from the name of a parameter (or batch-norm buffer) to its full initial tensor on the CPU.

    `model` may live on any device, `meta` too: names and shapes are read now, values are drawn at the call.
    Call this before an engine shards the model, as shapes must be the full ones.
    Rules by name and dimensions: 2-D and more: uniform by fan-in; 1-D `weight`: 1; `bias`: 0, but for
    `head.conv.bias` of BiT, which is uniform by the fan-in of `head.conv.weight`; `gamma*` (layer scale of
    timm models): 1e-5; running_mean 0, running_var 1, num_batches_tracked 0.

    The function raises KeyError for a name that the model does not have. `initial_tensors` itself raises
    ValueError for a 0-D or 1-D parameter that no rule covers, and for an empty one (already sharded).
    """
    plans: dict[str, tuple[tuple[int, ...], str, int | None]] = {}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, shape in shapes.items():
        last = name.rsplit(".", 1)[-1]
        if 0 in shape:
            # What ZeRO-3 leaves of a parameter; as a 1-D weight it would become ones.
            raise ValueError(f"The parameter {name} is empty: initial values need the model before sharding.")
        if name == "head.conv.bias" and "head.conv.weight" in shapes:
            plans[name] = (shape, "uniform", math.prod(shapes["head.conv.weight"][1:]))
        elif len(shape) >= 2:
            plans[name] = (shape, "uniform", None)
        elif last == "weight":
            plans[name] = (shape, "ones", None)
        elif last.endswith("bias"):
            plans[name] = (shape, "zeros", None)
        elif last.startswith("gamma"):
            plans[name] = (shape, "layer_scale", None)
        else:
            raise ValueError(f"No rule gives the parameter {name} of shape {shape} an initial value.")
    buffers = {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}

    def tensor(name: str) -> Tensor:
        if name in plans:
            shape, kind, fan_in = plans[name]
            return initial_value(name, shape, kind, seed, fan_in=fan_in)
        last = name.rsplit(".", 1)[-1]
        if name in buffers and last in _BUFFERS:
            value, dtype = _BUFFERS[last]
            return torch.full(buffers[name], value, dtype=dtype, device="cpu")
        raise KeyError(name)

    return tensor


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Fill the parameters of a plain (unsharded, allocated) model in place with `initial_tensors(model,
    seed)`.

    Raises ValueError when the model lies on `meta`: there is no memory to fill.
    """
    tensors = initial_tensors(model, seed)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"The parameter {name} lies on meta: give the model memory (to_empty) first.")
        parameter.copy_(tensors(name))
    for name, buffer in model.named_buffers():
        if name.rsplit(".", 1)[-1] in _BUFFERS:
            buffer.copy_(tensors(name))

"""A model under FSDP2: born on ``meta``, sharded, and each rank fills its own rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn

from scaletransfer.engine.filling import Values, fill, fill_lasting


def build_fsdp2(
    accelerator: Accelerator,
    create: Callable[[], nn.Module],
    source: Values,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    precision: str,
) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """What is called, the bare network (the same object), the base optimizer; arguments as for ``build_engine``.

    Raises:
        ValueError: accelerate has no FSDP plugin.
    """
    from accelerate.utils import fsdp2_prepare_model
    from torch.distributed.fsdp import MixedPrecisionPolicy

    with torch.device("meta"):
        module = create()
    plugin = accelerator.state.fsdp_plugin
    if plugin is None:
        raise ValueError("FSDP2 was asked for but accelerate made no FSDP plugin: start with launch/fsdp2.yaml")
    if precision == "bf16":
        # accelerate's own policy reduces gradients in bf16 together with the parameters
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    else:
        reduce_dtype = torch.float64 if precision == "fp64" else torch.float32
        plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    plugin.cpu_ram_efficient_loading = False  # it would need rank 0 to hold the whole model
    names = {type(m).__name__ for m in module.modules()}
    if "PreActBottleneck" not in names:
        plugin.auto_wrap_policy = None
    elif plugin.transformer_cls_names_to_wrap:
        # The head too: with many classes it is the largest tensor, and would otherwise stay gathered, with its whole
        # gradient, from the first moment of backward to the last.
        apart = [name for name in ("Classifier",) if name in names]
        plugin.transformer_cls_names_to_wrap = [*plugin.transformer_cls_names_to_wrap, *apart]
    module = fsdp2_prepare_model(accelerator, module)
    module.to_empty(device=accelerator.device)
    fill(module, source)
    fill_lasting(module, create)
    return module, module, make_optimizer(module)

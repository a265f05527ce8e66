"""Networks by name: BiT (`bit.py`) or timm's; initial values (`init.py`), checkpoints (`weights.py`)."""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor, nn

from scaletransfer.models.bit import PUBLISHED, BiT, Classifier, PreActBottleneck, parse_name
from scaletransfer.models.init import init_weights, initial_tensors, initial_value

__all__ = [
    "PUBLISHED",
    "BiT",
    "Classifier",
    "PreActBottleneck",
    "create_model",
    "head_names",
    "init_weights",
    "initial_tensors",
    "initial_value",
]


def create_model(name: str, num_classes: int, *, in_channels: int = 3, **options: Any) -> nn.Module:
    """Build the network `name` with `num_classes` outputs: images [b, c, h, w] -> logits [b, num_classes].

    `BiT-{S,M}-R{50,101,152}x{width}` and `BiT-tiny` come from `bit.py` (option `ws_eps`); `.published` is
    True for the sizes that were released. Any other name goes to timm with the remaining options, without
    pre-trained weights. Grey images [b, 1, h, w] are repeated where the network takes 3 channels.

    The values are PyTorch's default ones, drawn from the global generator: follow with
    `init_weights(model, seed)` for values that depend on the seed and the names only, or load a checkpoint.
    Under `torch.device("meta")` nothing is allocated.

    Raises ValueError for an unknown name (with the nearest known one), for options that the network does not
    have, and for a timm name where timm is not installed.
    """
    architecture = parse_name(name)
    if architecture is None:
        return _create_timm(name, num_classes, in_channels, options)
    unknown = sorted(set(options) - {"ws_eps"})
    if unknown:
        raise ValueError(f"Model {name} has no option {', '.join(unknown)}; the only one is ws_eps.")
    return BiT(architecture, num_classes, in_channels=in_channels, **options)


def head_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the classifier's parameters, those that depend on the number of classes.

    `head.conv.*` for BiT; for timm models the layer that timm itself names; () for any other network.
    """
    prefixes: Any = "head.conv" if isinstance(model, BiT) else getattr(model, "pretrained_cfg", {}).get("classifier")
    if isinstance(prefixes, str):
        prefixes = (prefixes,)
    starts = tuple(f"{prefix}." for prefix in prefixes or ())
    return tuple(name for name, _ in model.named_parameters() if name.startswith(starts)) if starts else ()


def _create_timm(name: str, num_classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    known = [*PUBLISHED, "BiT-tiny"]
    hint = "other BiT sizes are BiT-{S,M}-R{50,101,152}x{width}"
    if name.lower().startswith("bit-"):
        raise ValueError(f"Unknown model {name!r}: did you mean {_nearest(name, known)}? ({hint}.)")
    try:
        import timm
    except ImportError:
        raise ValueError(
            f"Unknown model {name!r}: the nearest of ours is {_nearest(name, known)} ({hint}), and models "
            "of timm need the extra: pip install 'scaletransfer[timm]'."
        ) from None
    # is_model looks into the registry; names such as hf-hub:... would download, so they are unknown here.
    if not timm.is_model(name):
        raise ValueError(f"Unknown model {name!r}: did you mean {_nearest(name, known + timm.list_models())}?")
    if options.get("pretrained"):
        raise ValueError(f"Model {name}: pretrained weights are not downloaded; load a file instead.")
    try:
        model: nn.Module = timm.create_model(name, num_classes=num_classes, in_chans=in_channels, **options)
    except TypeError as error:
        raise ValueError(f"Model {name} of timm refuses the options {options}: {error}.") from error
    if in_channels == 3:
        # A hook instead of a wrapper: parameter names stay timm's.
        model.register_forward_pre_hook(_repeat_grey)
    return model


def _repeat_grey(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *rest = args
    return (x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x, *rest)


def _nearest(name: str, known: list[str]) -> str:
    folded = {k.lower(): k for k in known}
    matches = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.0)
    return folded[matches[0]]

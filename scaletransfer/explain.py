"""Where a model looks: Grad-CAM (arXiv 1610.02391) of one output over the picture that the network got, by the package
grad-cam."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scaletransfer.models import BiT


def need_grad_cam() -> None:
    """ValueError with the extra's name where the package is not installed."""
    try:
        import pytorch_grad_cam  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--explain needs {error.name}, which is not installed: pip install 'scaletransfer[explain]'"
        ) from None


def target_layer(network: nn.Module, images: Tensor) -> nn.Module:
    """The layer whose maps are weighted: of BiT the last ReLU, behind the last norm; of another network the last one
    that still gives a map. ValueError where none does."""
    if isinstance(network, BiT):
        layer: nn.Module = network.get_submodule("head.relu")
        return layer
    found: list[nn.Module] = []

    def remember(module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1:
            found.append(module)

    hooks = [module.register_forward_hook(remember) for module in network.modules()]
    try:
        with torch.no_grad():
            network(images[:1])
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise ValueError(f"--explain needs a convolutional network, and {type(network).__name__} gives no map")
    return found[-1]


class _Head(nn.Module):
    """BiT behind its body: maps [n, C, h, w] -> logits [n, classes]."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, maps: Tensor) -> Tensor:
        made: Tensor = self.head(maps)
        return made.flatten(1)


def heat(network: nn.Module, images: Tensor, outputs: Sequence[Sequence[int]]) -> np.ndarray:
    """Grad-CAM of the outputs `outputs[i]`, as many for each image i of [n, c, h, w]: float32 [n, k, h, w], 0 to 1.

    A map is scaled to its own largest value: it says where, not how much. Of BiT the body runs once for all outputs,
    as nothing of it is needed for gradients at the last ReLU.
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.image import scale_cam_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    layer, model, x = target_layer(network, images), network, images
    if isinstance(network, BiT):
        model = _Head(network.head)
        with torch.no_grad():
            x = network.body(network.root(images.expand(-1, network.in_channels, -1, -1)))
    size = (images.shape[-1], images.shape[-2])
    found = []
    with warnings.catch_warnings(), torch.enable_grad(), GradCAM(model=model, target_layers=[layer]) as cam:
        warnings.simplefilter("ignore")
        for rank in range(len(outputs[0])):
            made = cam(input_tensor=x, targets=[ClassifierOutputTarget(chosen[rank]) for chosen in outputs])
            found.append(scale_cam_image(made, size))
    return np.stack(found, axis=1).astype(np.float32)


def overlay(pixels: Tensor, white: float, heated: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3]: the picture (integers [1 or 3, h, w]) under the colours of `heat`'s map [h, w]."""
    from pytorch_grad_cam.utils.image import show_cam_on_image

    picture = pixels.float().div(white).clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
    return np.asarray(show_cam_on_image(np.ascontiguousarray(picture), heated, use_rgb=True))

"""A model as ONNX: normalised images in, logits out; checked with onnxruntime before it is handed out."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scaletransfer.models import create_model
from scaletransfer.models.convolution import StdConv2d, standardize
from scaletransfer.models.files import Entry
from scaletransfer.models.weights import load_into, network_options

_SIDES = (64, 96)
"""Images that are compared: the first are also those that are traced."""
_TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit: several times what the order of additions makes."""


def write_onnx(path: Path, entries: Mapping[str, Entry], card: Mapping[str, Any]) -> list[str]:
    """Write ``path``: input ``images`` float32 [b, 3, h, w], normalised as metadata ``normalisation`` says; output
    ``logits`` [b, classes]. Batch and sides are free. Weights are standardised already.

    Raises ValueError where onnx, onnxscript or onnxruntime is not installed, or the file computes something else.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise ValueError(
            f"--format onnx needs {error.name}, which is not installed: pip install 'scaletransfer[onnx]'"
        ) from None
    network = create_model(card["model"], card["num_classes"], **network_options(card))
    load_into(network, {name: entry.read() for name, entry in entries.items()})
    network.eval()
    plain = _standardised(network)
    example = _images(2, *_SIDES)
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)  # that they are is checked below
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            plain,
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=(free,),
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(
        {
            "model": str(card["model"]),
            "task": str(card.get("task", "")),
            "normalisation": json.dumps(card.get("normalisation")),
            "transform": json.dumps(card.get("transform")),
            "label_names": json.dumps(card.get("label_names")),
        }
    )
    program.save(str(path))
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for images in (_images(1, _SIDES[0], _SIDES[0]), _images(3, _SIDES[1], _SIDES[0])):
        with torch.no_grad():
            expected = network(images).numpy()
        (found,) = session.run(None, {"images": images.numpy()})
        worst = max(worst, float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max()))))
    if not worst <= _TOLERANCE:
        raise ValueError(f"{path.name}: onnxruntime's logits differ by {worst:.2g} of the largest: not exported")
    return [f"onnxruntime computes the same logits: largest difference {worst:.1g} of the largest logit"]


def _images(count: int, height: int, width: int) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def _standardised(network: nn.Module) -> nn.Module:
    """A network of plain convolutions whose weights are standardised already."""
    import copy

    made = copy.deepcopy(network)
    for parent in list(made.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, StdConv2d):
                conv = nn.Conv2d(
                    child.in_channels,
                    child.out_channels,
                    child.kernel_size,  # type: ignore[arg-type]
                    stride=child.stride,  # type: ignore[arg-type]
                    padding=child.padding,  # type: ignore[arg-type]
                    bias=False,
                )
                conv.weight = nn.Parameter(standardize(child.weight.detach(), child.ws_eps))
                setattr(parent, name, conv)
    return made.eval()


@contextlib.contextmanager
def _quiet() -> Any:
    """Without the exporter's progress on the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)

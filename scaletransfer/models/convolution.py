"""Convolutions whose weight is standardised (arXiv 1903.10520), at little more than the cost of reading the weight.

Three ways to the same numbers:

- in every forward, and again in backward: nothing but the parameter is kept, which sharding engines free and gather;
- once for all micro-batches of an optimizer step (`OnceAStep`), where a rank holds the weights whole;
- once for an evaluation (`folding.folded`).

A convolution whose weight outweighs its images (a wide network on few pixels) is a matrix product on CPUs: libraries
copy the weight into a layout of their own for every convolution, which takes several times as long as the product.
There the weight is standardised piece by piece in the cache, on its way to the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIMM_WS_EPS = 1e-8
"""What timm's networks add to the variance when they standardise a weight; ours, as published and Google's, 1e-10."""
PIECE = 2 * 2**20
"""Bytes of a weight that are standardised at a time: they stay in the cache, and malloc has them at hand."""
FEW_POSITIONS, LARGE_WEIGHT = 192, 2**20
"""Up to so many output positions, and from so many numbers in the weight on, a product is faster (measured: 128
positions of 1,024 to 4,096 channels 17 ms against 24 ms, 32 positions of 4,096 to 8,192 channels 85 ms against 263 ms,
but 392 positions of 512 to 2,048 channels 16 ms against 6 ms)."""
_products = ContextVar("products", default=True)


def standardize(weight: Tensor, eps: float) -> Tensor:
    """Subtract each filter's mean and divide by its deviation, sqrt(biased variance + eps).

    weight: [rows, ...], any floating dtype, also 0 rows; statistics run over all but the first dimension. As
    a row needs nothing but itself, a shard of whole rows gives the same rows as the whole tensor. The result
    is float32, or float64 for float64 input: a bf16 weight loses nothing more here. Layer norm is this
    arithmetic as one operation.
    """
    return _standardized(weight, eps)[0].view_as(weight)


def _standardized(weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`standardize`'s result as rows [rows, n]; the weight as such rows; their means and inverse deviations."""
    if weight.dtype != torch.float64:
        weight = weight.float()
    rows = weight.flatten(1)
    result, mean, inverse = torch.native_layer_norm(rows, list(rows.shape[1:]), None, None, eps)
    if eps == TIMM_WS_EPS and len(rows):
        # as timm's StdConv2d computes it, so that its weights give its logits to the last bit
        result = F.batch_norm(rows[None], None, None, training=True, momentum=0.0, eps=eps)[0]
    return result, rows, mean, inverse


def _backward(grad: Tensor, rows: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of the raw rows from that of the standardised ones."""
    made: Tensor = torch.ops.aten.native_layer_norm_backward(
        grad.to(rows.dtype), rows, list(rows.shape[1:]), mean, inverse, None, None, [True, False, False]
    )[0]
    return made


def pieces(weight: Tensor) -> Iterator[slice]:
    """Slices of whole rows of about `PIECE` bytes that cover a weight; on a GPU a single one, as calls cost more."""
    step = max(1, PIECE * len(weight) // max(1, weight.numel() * weight.element_size()))
    if weight.device.type == "cuda":
        step = max(1, len(weight))
    return (slice(first, min(first + step, len(weight))) for first in range(0, len(weight), step))


class _StandardizedConvolution(torch.autograd.Function):
    """A convolution of which backward standardises the weight again.

    Left to autograd, every layer would keep its standardised weight from forward to backward: the whole model once
    more, also where an engine has spread the parameters over ranks. Here the parameter alone is kept, which sharding
    engines free and gather again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, stride: int, padding: int) -> Tensor:
        """[b, c_in or 1, h, w] and the raw weight -> [b, c_out, h', w'], in the dtype of x."""
        ctx.save_for_backward(x, weight)
        ctx.how = eps, [stride] * 2, [padding] * 2
        standard = _standardized(weight, eps)[0].view_as(weight)
        return F.conv2d(x, _for_channels(standard, x).to(x.dtype), None, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the raw weight."""
        x, weight = ctx.saved_tensors
        eps, stride, padding = ctx.how
        result, rows, mean, inverse = _standardized(weight, eps)
        standard = _for_channels(result.view_as(weight), x).to(x.dtype)
        del result
        wanted = [*ctx.needs_input_grad[:2], False]
        grad_x, grad_standard, _ = torch.ops.aten.convolution_backward(
            grad, x, standard, None, stride, padding, [1, 1], False, [0, 0], 1, wanted
        )
        del standard
        if grad_standard is None:
            return grad_x, None, None, None, None
        grad_rows = _backward(grad_standard.expand_as(weight).reshape(rows.shape), rows, mean, inverse)
        return grad_x, grad_rows.view_as(weight).to(weight.dtype), None, None, None


class _StandardizedProduct(torch.autograd.Function):
    """The same as a product with the columns of the images, the weight standardised piece by piece in both passes."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[n, positions] and the raw weight [c_out, ...] of n numbers a row -> [c_out, positions]."""
        ctx.save_for_backward(columns, weight)
        ctx.eps = eps
        out = columns.new_empty(len(weight), columns.shape[1])
        for part in pieces(weight):
            torch.mm(_standardized(weight[part], eps)[0].to(columns.dtype), columns, out=out[part])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the columns and of the raw weight."""
        columns, weight = ctx.saved_tensors
        grad_columns = torch.zeros_like(columns) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for part in pieces(weight):
            standard, rows, mean, inverse = _standardized(weight[part], ctx.eps)
            if grad_columns is not None:
                torch.addmm(grad_columns, standard.to(columns.dtype).t(), grad[part], out=grad_columns)
            if grad_weight is not None:
                grad_weight[part] = _backward(grad[part] @ columns.t(), rows, mean, inverse).view_as(weight[part])
        return grad_columns, grad_weight, None


class _Product(torch.autograd.Function):
    """The product with a weight that is standardised already, in the same pieces, so that the numbers are the same."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, weight: Tensor) -> Tensor:
        """[n, positions] and a weight [c_out, ...] of n numbers a row -> [c_out, positions]."""
        ctx.save_for_backward(columns, weight)
        out = columns.new_empty(len(weight), columns.shape[1])
        for part in pieces(weight):
            torch.mm(weight[part].flatten(1), columns, out=out[part])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the columns and of the weight."""
        columns, weight = ctx.saved_tensors
        grad_columns = weight.flatten(1).t() @ grad if ctx.needs_input_grad[0] else None
        grad_weight = (grad @ columns.t()).view_as(weight) if ctx.needs_input_grad[1] else None
        return grad_columns, grad_weight


def _for_channels(standard: Tensor, x: Tensor) -> Tensor:
    """The weight for images of one channel that stands for all: its sum over the inputs, which is the same function."""
    return standard.sum(1, keepdim=True) if x.shape[1] == 1 != standard.shape[1] else standard


@contextmanager
def without_products() -> Iterator[None]:
    """Inside, every convolution is one, whatever its sizes: so that a trace holds for other sizes as well."""
    before = _products.set(False)
    try:
        yield
    finally:
        _products.reset(before)


def _as_product(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    if not _products.get() or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    kernel = weight.shape[-1]
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in x.shape[-2:])
    few = len(x) * height * width <= FEW_POSITIONS
    return few and weight.numel() >= LARGE_WEIGHT and x.shape[1] == weight.shape[1]


def _columns(x: Tensor, kernel: int, stride: int, padding: int) -> tuple[Tensor, tuple[int, int, int]]:
    """What each output position sees, [c_in * kernel^2, positions]; and b, h', w'."""
    if kernel == 1:
        x = x[:, :, ::stride, ::stride]
        seen, (height, width) = x.flatten(2), x.shape[-2:]
    else:
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in x.shape[-2:])
        seen = F.unfold(x, kernel, padding=padding, stride=stride)
    return seen.transpose(0, 1).reshape(seen.shape[1], -1), (len(x), height, width)


def _images(out: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """[c, positions] -> [b, c, h, w]."""
    batch, height, width = shape
    return out.view(len(out), batch, height, width).transpose(0, 1).contiguous()


class StdConv2d(nn.Conv2d):
    """A convolution whose weight is standardised. Use `ws_eps` 1e-8 to agree with timm.

    Images of one channel stand for `c_in` equal ones.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, *, stride: int = 1, ws_eps: float) -> None:
        # Padding is symmetric, as in PyTorch's own convolutions: 3 for the root's 7x7, 1 for 3x3.
        super().__init__(c_in, c_out, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.ws_eps = ws_eps
        self.standard: Tensor | None = None
        """The standardised weight, while `folding.folded` or a step of `OnceAStep` holds it."""
        self.joined = False
        """Whether this is the micro-batch whose backward ends in the parameter: see `OnceAStep`."""

    def forward(self, x: Tensor) -> Tensor:
        """[b, c_in, h, w] or [b, 1, h, w] -> [b, c_out, h', w'], in the dtype of x (or of autocast)."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        stride, padding = self.stride[0], int(self.padding[0])
        # with timm's eps timm's logits are wanted to the last bit, and a product rounds otherwise
        product = self.ws_eps != TIMM_WS_EPS and _as_product(x, self.weight, stride, padding)
        if self.standard is None:
            if product:
                return self._multiplied(x, None)
            made: Tensor = _StandardizedConvolution.apply(x, self.weight, self.ws_eps, stride, padding)
            return made
        standard: Tensor = _Joined.apply(self.weight, self.standard, self.ws_eps) if self.joined else self.standard
        if product:
            return self._multiplied(x, standard)
        return F.conv2d(x, _for_channels(standard, x).to(x.dtype), None, stride, padding)

    @torch.compiler.disable  # type: ignore[misc]  # the compiler would write out the loop over pieces
    def _multiplied(self, x: Tensor, standard: Tensor | None) -> Tensor:
        columns, shape = _columns(x, self.kernel_size[0], self.stride[0], int(self.padding[0]))
        if standard is None:
            return _images(_StandardizedProduct.apply(columns, self.weight, self.ws_eps), shape)
        return _images(_Product.apply(columns, standard.to(x.dtype)), shape)


class _Joined(torch.autograd.Function):
    """Gives the standardised weight; backward adds to its gradient those of the micro-batches before, and goes on from
    there to the parameter."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, standard: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.standard, ctx.eps = standard, eps
        return standard.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        total, ctx.standard.grad = ctx.standard.grad, None
        if total is None:
            total = torch.empty_like(grad).copy_(grad)
        else:
            total.add_(grad)
        total = total.contiguous()  # and this memory takes the gradient of the parameter, piece by piece
        for part in pieces(weight):
            _, rows, mean, inverse = _standardized(weight[part], ctx.eps)
            total[part] = _backward(total[part].flatten(1), rows, mean, inverse).view_as(total[part])
        return total.to(weight.dtype), None, None


class OnceAStep:
    """Standardised weights for all micro-batches of an optimizer step, and one backward through standardisation.

    In the micro-batches before the last, the standardised weights are leaves: gradients are added up on them, and
    nothing reaches the parameters. In the last one each layer's gradient, as soon as it is there, takes those sums with
    it and goes on to the parameter: whatever waits for the parameter's gradient (DDP's buckets) sees it once a
    step, complete. Only for networks whose parameters are whole and do not change inside a step.

    The copy of the weights is kept from step to step, in float32 (float64 of a float64 network).
    """

    def __init__(self, network: nn.Module) -> None:
        self._layers = [module for module in network.modules() if isinstance(module, StdConv2d)]
        self._kept: list[Tensor] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Weights are those of now, until the end."""
        self._standardise()
        try:
            for layer, kept in zip(self._layers, self._kept, strict=True):
                layer.standard = kept.detach().requires_grad_(layer.weight.requires_grad)
            yield
        finally:
            for layer in self._layers:
                layer.standard, layer.joined = None, False

    def last(self) -> None:
        """The next micro-batch is the last one of its step."""
        for layer in self._layers:
            layer.joined = layer.weight.requires_grad

    @torch.no_grad()
    def _standardise(self) -> None:
        weights = [layer.weight for layer in self._layers]
        if not self._kept:
            wide = [torch.promote_types(weight.dtype, torch.float32) for weight in weights]
            self._kept = [
                torch.empty(w.shape, dtype=dtype, device=w.device) for w, dtype in zip(weights, wide, strict=True)
            ]
        for layer, kept in zip(self._layers, self._kept, strict=True):
            for part in pieces(layer.weight):
                rows, _, _, _ = _standardized(layer.weight[part], layer.ws_eps)
                kept[part] = rows.view_as(kept[part])

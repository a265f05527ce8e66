"""Image pipelines (torchvision.transforms.v2): a decoded image of any size -> an integer tensor of one size.

Pixels stay uint8 (or uint16) until they are on the device, where `Normalizer` turns them into floats.
Everything random draws from torch's default CPU generator and from nothing else, so `seeded` decides it
completely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

AugmentProtocol = Literal["paper", "corrected"]
DEEP_COLOUR = "A 16-bit image was given to the pipeline for natural images; use kind 'xray' or 8-bit files."
Decoded = Image.Image | np.ndarray | Tensor
_CROP_RATIO = 256 / 224  # of ImageNet's evaluation: Resize(256), CenterCrop(224)
LONGEST = 8  # longest side in short sides that `bit_transform` resizes as a whole


@dataclass(frozen=True, kw_only=True)
class TransformOptions:
    """What a training pipeline draws. None leaves the protocol's value. ValueError names a bad field."""

    shift: float | None = None
    """X-ray: largest shift along each axis, as a share of the side (paper 0.25, corrected 0.15)."""
    rotation: float | None = None
    """X-ray: largest rotation in degrees, either way (45)."""
    scale: tuple[float, float] | None = None
    """X-ray: smallest and largest zoom (0.9, 1.1)."""
    flip: float | None = None
    """Probability of a horizontal flip (X-ray: paper 0.5, corrected 0, as anatomy has sides; natural 0.5)."""
    randaugment: bool = False
    """Natural: RandAugment (arXiv 1909.13719) after crop and flip."""
    randaugment_ops: int = 2
    """RandAugment's N."""
    randaugment_magnitude: int = 9
    """RandAugment's M, of 0 to 30."""

    def __post_init__(self) -> None:
        if self.shift is not None and not 0 <= self.shift <= 1:
            raise ValueError(f"transform shift must be in [0, 1], not {self.shift}.")
        if self.rotation is not None and not 0 <= self.rotation <= 180:
            raise ValueError(f"transform rotation must be 0 to 180 degrees, not {self.rotation}.")
        if self.scale is not None and not (len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1]):
            raise ValueError(f"transform scale must be two numbers above 0, smaller first, not {self.scale}.")
        if self.flip is not None and not 0 <= self.flip <= 1:
            raise ValueError(f"transform flip must be a probability, not {self.flip}.")
        if self.randaugment_ops < 1 or not 0 <= self.randaugment_magnitude <= 30:
            raise ValueError("transform randaugment_ops must be 1 or more and randaugment_magnitude 0 to 30.")


XRAY: dict[str, dict[str, Any]] = {
    "paper": {"shift": 0.25, "rotation": 45.0, "scale": (0.9, 1.1), "flip": 0.5},
    "corrected": {"shift": 0.15, "rotation": 45.0, "scale": (0.9, 1.1), "flip": 0.0},
}
"""What an X-ray's training pipeline draws where the options leave it to the protocol."""


def kind_refusal(kind: str, size: int, protocol: str, options: TransformOptions) -> str:
    """Why there is no such pipeline (see `build_transform`); "" where there is one."""
    if protocol not in XRAY:
        return f"transform protocol must be paper or corrected, not {protocol!r}."
    if size < 1:
        return f"transform size must be 1 pixel or more, not {size}."
    if kind not in ("xray", "natural"):
        return f"transform kind must be xray or natural, not {kind!r}."
    if kind == "xray":
        if options.randaugment:
            return "transform randaugment is for natural images; X-rays have shift, rotation and scale."
        return ""
    for name in ("shift", "rotation", "scale"):
        if getattr(options, name) is not None:
            return f"transform {name} is for X-rays; natural images have a random crop, flip and randaugment."
    return ""


def build_transform(
    kind: Literal["xray", "natural"],
    train: bool,
    size: int,
    protocol: AugmentProtocol = "corrected",
    options: TransformOptions | None = None,
) -> Callable[[Decoded], Tensor]:
    """The pipeline from a decoded image to a tensor of side `size`.

    Input: a PIL image, or an array or tensor of uint8 or uint16, [H, W], or [H, W, c] (array), [c, H, W]
    (tensor). "xray" gives [1, size, size], uint8 or for 16-bit input uint16: centre square crop, antialiased
    resize, in training `ReflectedAffine`. "natural" gives uint8 [3, size, size]: RandomResizedCrop, flip and,
    as an option, RandAugment in training; else Resize(size * 256 / 224) of the short side and CenterCrop.
    Evaluation pipelines draw nothing.

    Raises ValueError for another kind or protocol, a size below 1, and options that the kind does not have;
    the pipeline itself for an image of another type, and for a 16-bit image under "natural".
    """
    options = options or TransformOptions()
    refusal = kind_refusal(kind, size, protocol, options)
    if refusal:
        raise ValueError(refusal)
    if kind == "xray":
        return v2.Compose([_grey_tensor, _SquareResize(size), *([_xray_affine(protocol, options)] if train else [])])
    if not train:
        return v2.Compose([_rgb_tensor, v2.Resize(round(size * _CROP_RATIO)), v2.CenterCrop(size)])
    steps: list[Any] = [_rgb_tensor, v2.RandomResizedCrop(size)]
    steps.append(v2.RandomHorizontalFlip(0.5 if options.flip is None else options.flip))
    if options.randaugment:
        steps.append(v2.RandAugment(options.randaugment_ops, options.randaugment_magnitude))
    return v2.Compose(steps)


def bit_transform(train: bool, precrop: int, crop: int, *, square: bool, flip: float) -> Callable[[Tensor], Tensor]:
    """The pipeline for fine-tuning by BiT-HyperRule: uint8 or uint16 [1 or 3, H, W] -> the same, of side `crop`.

    Training: antialiased bilinear resize to precrop x precrop pixels (`square`, as BiT does: arXiv 1912.11370,
    section 3.3, and bit_pytorch/train.py of https://github.com/google-research/big_transfer) or of the short side to
    precrop (not `square`, the published transfer code), a uniform random crop, a horizontal flip with probability
    `flip`.  Evaluation: resize to crop x crop, nothing drawn.  BiT resizes Pillow images; the largest difference
    from that is one level of 8 bits.

    Without `square`, a picture more than eight times as long as wide first loses what lies outside of a window of
    eight times its short side: its place along the long side is that of the crop, so that crops stay uniform over
    the whole picture, and the resized picture has a bounded size.

    Raises ValueError for a crop below 1 or above precrop and for a flip that is no probability; the pipeline itself
    for an image of another type or shape.
    """
    if not 1 <= crop <= precrop:
        raise ValueError(f"The crop must have 1 pixel or more and fit into the resized image, not {crop} of {precrop}.")
    if not 0 <= flip <= 1:
        raise ValueError(f"transform flip must be a probability, not {flip}.")
    if not train:
        return v2.Compose([_grey_or_rgb, _Resize(crop)])
    return v2.Compose([_grey_or_rgb, _PrecropCrop(precrop, crop, square), v2.RandomHorizontalFlip(flip)])


def bit_resize(pixels: Tensor, train: bool, precrop: int, crop: int, *, square: bool) -> Tensor | None:
    """What `bit_transform`'s pipeline does before it draws anything: that pipeline gives the same, bit for bit, for the
    result as for `pixels`, since it leaves a picture as it is that has the size already.

    None for a picture of which the pipeline cuts out a window first (see there).
    """
    pixels = _grey_or_rgb(pixels)
    if not train:
        return _resized(pixels, crop, crop)
    if not square and max(pixels.shape[-2:]) > LONGEST * min(pixels.shape[-2:]):
        return None
    return _precropped(pixels, precrop, square)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's default CPU generator starts from `seed`; outside, it goes on as if nothing had
    happened.

    Generators of accelerators are neither seeded nor saved (torch.manual_seed would touch them).
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class ReflectedAffine(v2.Transform):
    """One bilinear resampling for zoom, rotation, shift and flip, the picture mirrored at its border.

    Each picture [..., h, w] draws uniformly: rotation within +-`rotation` degrees, zoom within `scale` (the
    same in both directions), a shift along each axis within +-`shift` of that side, a flip with probability
    `flip` (done first). Rotation and zoom are about the centre. The border is mirrored including its
    outermost pixels (d c b a | a b c d). Integer pictures come back in their dtype, rounded.
    """

    def __init__(self, *, shift: float, rotation: float, scale: tuple[float, float], flip: float) -> None:
        super().__init__()
        self.shift, self.rotation, self.scale, self.flip = shift, rotation, scale, flip

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw angle (degrees), zoom, dx, dy (shares of the side) and flip. Five numbers whatever the
        ranges."""
        u = torch.rand(5, dtype=torch.float64).tolist()
        low, high = self.scale
        return {
            "angle": (2 * u[0] - 1) * self.rotation,
            "zoom": low + (high - low) * u[1],
            "dx": (2 * u[2] - 1) * self.shift,
            "dy": (2 * u[3] - 1) * self.shift,
            "flip": u[4] < self.flip,
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Apply drawn `params` to one tensor [..., h, w]."""
        height, width = inpt.shape[-2:]
        angle = np.deg2rad(params["angle"])
        # Output -> input, in pixels about the centre: undo shift, rotation and zoom, then the flip.
        inverse = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / params["zoom"]
        if params["flip"]:
            inverse[0] = -inverse[0]
        # affine_grid counts in half sides, so x and y have different units where the picture is not square.
        half = np.array([width, height]) / 2
        matrix = inverse * half[None, :] / half[:, None]
        offset = -matrix @ np.array([2 * params["dx"], 2 * params["dy"]])
        theta = torch.tensor(np.column_stack([matrix, offset]), dtype=torch.float32)[None]
        planes = inpt.reshape(1, -1, height, width)
        grid = nnf.affine_grid(theta, [1, 1, height, width], align_corners=False)
        moved = nnf.grid_sample(planes.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        return _to_dtype(moved, inpt.dtype).reshape(inpt.shape)


class Normalizer(nn.Module):
    """(pixel / pixel_max - mean) / std, on the device: uint8 or uint16 [b, c, H, W] -> float32.

    mean and std: one number, or one a channel; three of them turn grey batches into three channels.
    pixel_max: the value that stands for 1, 255 or 65535. Raises ValueError for values that are not positive
    (std, pixel_max), and for as many means as neither 1 nor the number of deviations.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float], pixel_max: float = 255.0) -> None:
        super().__init__()
        means, deviations = np.atleast_1d(mean).astype(np.float64), np.atleast_1d(std).astype(np.float64)
        if 1 not in (len(means), len(deviations)) and len(means) != len(deviations):
            raise ValueError(f"Normalisation has {len(means)} means but {len(deviations)} deviations.")
        if not (deviations > 0).all() or not pixel_max > 0:
            raise ValueError(f"Normalisation needs std and pixel_max above 0, not {std} and {pixel_max}.")
        self.pixel_max = float(pixel_max)
        # Not persistent: a model's file keeps them in model.json, not among its weights.
        self.register_buffer("mean", torch.tensor(means, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(deviations, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """[b, c, H, W] of any integer dtype -> float32 [b, c, H, W]."""
        return (images.to(torch.float32) / self.pixel_max - self.mean) / self.std


class _SquareResize(v2.Transform):
    """The centre square (odd rests lose the pixel at the end), resized with antialiasing to `size`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = inpt.shape[-2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = inpt[..., top : top + side, left : left + side]
        if side == self.size:
            return square.contiguous()
        return _resized(square, self.size, self.size)


class _Resize(v2.Transform):
    """To `size` x `size`, whatever the proportions."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return _resized(inpt, self.size, self.size)


class _PrecropCrop(v2.Transform):
    """Resize, then cut out crop x crop pixels, every place equally likely; see `bit_transform`."""

    def __init__(self, precrop: int, crop: int, square: bool) -> None:
        super().__init__()
        self.precrop, self.crop, self.square = precrop, crop, square

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        down, across = torch.rand(2, dtype=torch.float64).tolist()
        return {"down": down, "across": across}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not self.square:
            longest = LONGEST * min(inpt.shape[-2:])
            inpt = _cut(inpt, min(inpt.shape[-2], longest), min(inpt.shape[-1], longest), params)
        return _cut(_precropped(inpt, self.precrop, self.square), self.crop, self.crop, params).contiguous()


def _precropped(pixels: Tensor, precrop: int, square: bool) -> Tensor:
    height, width = pixels.shape[-2:]
    short = min(height, width)
    if square:
        return _resized(pixels, precrop, precrop)
    # Rounded down, as torchvision's and the published code's Resize does.
    return _resized(pixels, precrop * height // short, precrop * width // short)


def _cut(pixels: Tensor, height: int, width: int, params: dict[str, float]) -> Tensor:
    """The part [..., height, width] that lies at the shares `down` and `across` of the places it can have."""
    top = int(params["down"] * (pixels.shape[-2] - height + 1))
    left = int(params["across"] * (pixels.shape[-1] - width + 1))
    return pixels[..., top : top + height, left : left + width]


def _resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bilinear, in the dtype of `pixels`."""
    if pixels.dtype == torch.uint8:
        return tvf.resize(pixels, [height, width], antialias=True)
    # uint16 has few kernels of its own.
    return _to_dtype(tvf.resize(pixels.float(), [height, width], antialias=True), pixels.dtype)


def _xray_affine(protocol: str, options: TransformOptions) -> ReflectedAffine:
    values = {
        name: default if getattr(options, name) is None else getattr(options, name)
        for name, default in XRAY[protocol].items()
    }
    return ReflectedAffine(**values)


def _to_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return values.to(dtype)
    limits = torch.iinfo(dtype)
    return values.round().clamp(limits.min, limits.max).to(dtype)


def _grey_tensor(image: Decoded) -> Tensor:
    """Any decoded image -> uint8 or uint16 [1, H, W]."""
    if isinstance(image, Image.Image) and not image.mode.startswith("I"):
        image = image.convert("L")
    pixels = _tensor(image)
    if len(pixels) in (2, 4):
        pixels = pixels[:-1]  # transparency
    if len(pixels) == 1:
        return pixels
    # ITU-R 601-2, as in Pillow's conversion to "L".
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return _to_dtype((pixels.float() * weights).sum(0, keepdim=True), pixels.dtype)


def _grey_or_rgb(image: Decoded) -> Tensor:
    """A decoded image of one or three channels, as it is."""
    pixels = _tensor(image)
    if len(pixels) not in (1, 3):
        raise ValueError(f"An image must have 1 or 3 channels, not the shape {tuple(pixels.shape)}.")
    return pixels


def _rgb_tensor(image: Decoded) -> Tensor:
    """Any decoded 8-bit image -> uint8 [3, H, W]."""
    if isinstance(image, Image.Image) and not image.mode.startswith("I"):
        image = image.convert("RGB")
    pixels = _tensor(image)
    if pixels.dtype != torch.uint8:
        raise ValueError(DEEP_COLOUR)
    if len(pixels) in (2, 4):
        pixels = pixels[:-1]
    return pixels.expand(3, -1, -1)


def _tensor(image: Decoded) -> Tensor:
    """uint8 or uint16 [c, H, W], c from 1 to 4."""
    if isinstance(image, Image.Image):
        image = np.array(image)
    if isinstance(image, np.ndarray):
        if image.dtype == np.int32 and image.size and image.min() >= 0 and image.max() <= 65535:
            # Pillow's mode "I": some 16-bit files are opened as 32-bit.
            image = image.astype(np.uint16)
        if image.dtype.kind == "u" and not image.dtype.isnative:
            image = image.astype(image.dtype.newbyteorder("="))
        if image.dtype in (np.uint8, np.uint16):
            pixels = torch.from_numpy(np.ascontiguousarray(image))
            image = pixels.movedim(-1, 0) if pixels.ndim == 3 else pixels
    if not isinstance(image, Tensor) or image.dtype not in (torch.uint8, torch.uint16):
        raise ValueError(f"An image must have 8 or 16 bits without sign a channel, not {_kind(image)}.")
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3 or not 1 <= len(image) <= 4 or 0 in image.shape:
        raise ValueError(f"An image must have height, width and 1 to 4 channels, not the shape {tuple(image.shape)}.")
    return image


def _kind(image: Any) -> str:
    return str(getattr(image, "dtype", type(image).__name__))

"""The pipeline of BiT-HyperRule against torchvision and Pillow: sizes, places of crops, flips."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats
from torch import Tensor
from torchvision.transforms import v2

from scaletransfer import transforms
from scaletransfer.transforms import bit_transform, seeded


def _smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A grey picture without sharp edges, float64 in [0, 255]."""
    picture = ndimage.gaussian_filter(np.random.default_rng(seed).random((height, width)), 3, mode="reflect")
    picture -= picture.min()
    return picture / picture.max() * 255


def _colour(height: int, width: int) -> np.ndarray:
    return np.stack([np.round(_smooth(height, width, seed=s)).astype(np.uint8) for s in range(3)], -1)


@pytest.mark.parametrize("shape", [(150, 120), (90, 200), (40, 30)])
def test_bit_evaluation_is_pillows_resize_to_the_crop(shape: tuple[int, int]) -> None:
    picture = _colour(*shape)
    transform = bit_transform(False, 80, 64, square=True, flip=0.5)
    state = torch.get_rng_state()
    result = transform(torch.from_numpy(picture).permute(2, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    expected = np.asarray(Image.fromarray(picture).resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    assert result.dtype == torch.uint8
    assert abs(result.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("shape", [(150, 120), (90, 200), (30, 233), (65, 65)])
def test_bit_training_is_a_crop_of_torchvisions_resize(shape: tuple[int, int], square: bool) -> None:
    """Each result is one crop, flipped or not, of what v2.Resize makes of the whole picture."""
    picture = torch.from_numpy(_colour(*shape)).permute(2, 0, 1)
    resized = v2.Resize((80, 80) if square else 80, antialias=True)(picture)

    def is_crop(result: Tensor) -> bool:
        places = (resized == result[:, :1, :1]).all(0)[: resized.shape[1] - 63, : resized.shape[2] - 63].nonzero()
        return any(torch.equal(resized[:, y : y + 64, x : x + 64], result) for y, x in places.tolist())

    transform = bit_transform(True, 80, 64, square=square, flip=0.5)
    for seed in range(6):
        with seeded(seed):
            result = transform(picture)
        assert result.shape == (3, 64, 64) and result.dtype == torch.uint8 and result.is_contiguous()
        assert is_crop(result) or is_crop(result.flip(-1))


@pytest.mark.parametrize("square", [True, False])
def test_bit_crops_are_uniform_and_flips_have_their_probability(square: bool) -> None:
    """The pixel in the corner tells the place: 17 of them along each axis (33 along the long side if not square)."""
    width = 80 if square else 96
    ramp = torch.arange(80 * width, dtype=torch.int32).reshape(1, 80, width)
    transform = bit_transform(True, 80, 64, square=square, flip=0.3)
    places, flips = [], 0
    with seeded(11):
        for _ in range(2000):
            corners = transform(ramp.to(torch.uint16))[0, 0].to(torch.int32)
            flips += int(corners[0] > corners[-1])
            corner = int(min(corners[0], corners[-1]))
            places.append(divmod(corner, width))
    assert abs(flips / 2000 - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
    rows, columns = np.array(places).T
    for drawn, count in ((rows, 17), (columns, width - 63)):
        found = np.bincount(drawn, minlength=count)
        assert len(found) == count and stats.chisquare(found).pvalue > 1e-3
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.08


def test_bit_keeps_dtype_and_channels() -> None:
    grey = torch.from_numpy(np.round(_smooth(50, 70)).astype(np.uint8))[None]
    for train in (True, False):
        transform = bit_transform(train, 40, 32, square=False, flip=1.0)
        for picture in (grey, grey.expand(3, -1, -1)):
            with seeded(2):
                low = transform(picture)
            with seeded(2):
                high = transform((picture.to(torch.int32) * 257).to(torch.uint16))
            assert (low.dtype, high.dtype) == (torch.uint8, torch.uint16)
            assert low.shape == high.shape == (len(picture), 32, 32)
            assert abs(high.float() / 257 - low.float()).max() < 1.1  # 8 bits are rounded between the two axes


@pytest.mark.parametrize("turned", [False, True])
def test_bit_crops_of_elongated_pictures_reach_every_part(turned: bool) -> None:
    """10 x 4000 pixels at precrop 512 would be 204,800 pixels long: the picture that is resized stays small."""
    ramp = torch.linspace(0, 65535, 4000).round().to(torch.uint16).expand(1, 10, 4000)
    picture = ramp.transpose(1, 2) if turned else ramp
    transform = bit_transform(True, 64, 48, square=False, flip=0.0)
    middles = []
    with seeded(3):
        for _ in range(400):
            result = transform(picture).float()
            assert result.shape == (1, 48, 48)
            middles.append(result.mean().item() / 65535)
            assert result.max() - result.min() < 65535 * 12 / 4000  # about 48 / 64 of the ten pixels of the short side
    assert stats.kstest(middles, "uniform").pvalue > 1e-3
    for shape in ((1, 4000), (4000, 1), (1, 1)):
        for train in (True, False):
            assert (
                bit_transform(train, 64, 48, square=False, flip=0.0)(torch.zeros(3, *shape, dtype=torch.uint8)).any()
                == 0
            )


def test_bit_resizes_a_window_of_elongated_pictures(monkeypatch) -> None:
    sizes = []
    original = transforms._resized

    def note(pixels: Tensor, height: int, width: int) -> Tensor:
        sizes.append((height, width))
        return original(pixels, height, width)

    monkeypatch.setattr(transforms, "_resized", note)
    for shape in ((10, 4000), (4000, 10), (10, 80), (10, 79)):
        bit_transform(True, 64, 48, square=False, flip=0.0)(torch.zeros(1, *shape, dtype=torch.uint8))
    assert sizes == [(64, 512), (512, 64), (64, 512), (64, 505)]


def test_bit_refusals() -> None:
    for arguments, message in [
        ((True, 32, 33, 0.5), "not 33 of 32"),
        ((False, 32, 0, 0.5), "1 pixel or more"),
        ((True, 32, 32, 1.5), "flip must be a probability, not 1.5"),
    ]:
        train, precrop, crop, flip = arguments
        with pytest.raises(ValueError, match=message):
            bit_transform(train, precrop, crop, square=True, flip=flip)
    transform = bit_transform(True, 32, 32, square=True, flip=0.5)
    for image, message in (
        (torch.zeros(2, 8, 8, dtype=torch.uint8), "1 or 3 channels"),
        (torch.zeros(3, 8, 8), "8 or 16 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            transform(image)

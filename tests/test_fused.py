"""One resampling an image: the same picture as torchvision's chain of operations, and how far they may differ."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as tvf

from scaletransfer.decode import Decoding, decode
from scaletransfer.fused import Box, CentreSquare, Fused, Geometry, RandomCrop, SquareAffine, build_fused
from scaletransfer.order import sample_uniforms
from scaletransfer.transforms import ReflectedAffine, TransformOptions, build_transform

SIZE = 64


def smooth(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    """uint8 [h, w, c]: like a radiograph, without detail near the size of a pixel of the result."""
    coarse = np.random.default_rng(seed).random((9, 9, channels)).astype(np.float32) * 255
    picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)
    return np.clip(picture, 0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray, quality: int = 95) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def run(fused: Fused, data: bytes, position: int = 0, how: Decoding | None = None) -> np.ndarray:
    how = how or Decoding()
    out = np.empty((fused.channels, fused.size, fused.size), np.uint8 if how.depth == 8 else np.uint16)
    fused(data, how, sample_uniforms(1, position), out)
    return out


def psnr(one: np.ndarray, other: np.ndarray, edge: int = 0) -> float:
    inner = slice(edge, one.shape[-1] - edge)
    error = np.square(one[..., inner, inner].astype(np.float64) - other[..., inner, inner].astype(np.float64)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def xray(protocol: str = "paper", **options) -> Fused:
    found = build_fused("xray", True, SIZE, protocol, TransformOptions(**options))  # type: ignore[arg-type]
    assert found is not None
    return found


# ---- against torchvision


@pytest.mark.parametrize(("height", "width"), [(70, 81), (100, 90), (127, 127), (300, 260), (1031, 871), (2000, 2303)])
def test_xray_training_is_the_affine_of_the_resized_square(height, width):
    """Same draws, torchvision's antialiased resize and then our `ReflectedAffine`: two resamplings in place of one."""
    data = jpeg(smooth(height, width, 1))
    square = build_transform("xray", False, SIZE)(decode(data, 1))
    affine = ReflectedAffine(shift=0.25, rotation=45, scale=(0.9, 1.1), flip=0.5)
    for position in range(6):
        u = sample_uniforms(1, position)
        drawn = {"angle": (2 * u[0] - 1) * 45, "zoom": 0.9 + 0.2 * u[1], "flip": u[4] < 0.5}
        drawn |= {"dx": (2 * u[2] - 1) * 0.25, "dy": (2 * u[3] - 1) * 0.25}
        assert psnr(run(xray(), data, position), affine.transform(square, drawn).numpy()) > 35


@pytest.mark.parametrize(("height", "width"), [(70, 81), (128, 140), (300, 260), (1031, 871), (2000, 2303)])
def test_xray_evaluation_is_the_resized_square(height, width):
    data = jpeg(smooth(height, width, 1))
    fused = build_fused("xray", False, SIZE)
    assert fused is not None
    assert psnr(run(fused, data), build_transform("xray", False, SIZE)(decode(data, 1)).numpy()) > 44


@pytest.mark.parametrize(("height", "width"), [(70, 81), (128, 140), (375, 500), (1031, 1500), (64, 700)])
def test_natural_training_is_torchvisions_resized_crop(height, width):
    data = jpeg(smooth(height, width, 3))
    fused = build_fused("natural", True, SIZE)
    assert fused is not None
    for position in range(8):
        u = sample_uniforms(1, position)
        box = RandomCrop(size=SIZE, flip=0.5).used(height, width, u)
        place = [int(box.top), int(box.left), int(box.height), int(box.width)]
        wanted = tvf.resized_crop(decode(data, 3), *place, [SIZE, SIZE], antialias=True)
        wanted = tvf.hflip(wanted) if u[2] < 0.5 else wanted
        assert psnr(run(fused, data, position), wanted.numpy()) > 36


def test_a_picture_of_the_wanted_size_keeps_every_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 1), dtype=np.uint8)
    still = xray(shift=0.0, rotation=0.0, scale=(1.0, 1.0), flip=0.0)
    evaluation = build_fused("xray", False, SIZE)
    assert evaluation is not None
    np.testing.assert_array_equal(run(still, png(pixels))[0], pixels[..., 0])
    np.testing.assert_array_equal(run(evaluation, png(pixels))[0], pixels[..., 0])
    flipped = xray(shift=0.0, rotation=0.0, scale=(1.0, 1.0), flip=1.0)
    np.testing.assert_array_equal(run(flipped, png(pixels))[0], pixels[:, ::-1, 0])
    moved = xray(shift=1.0, rotation=0.0, scale=(1.0, 1.0), flip=0.0)
    u = sample_uniforms(1, 0)
    out = np.empty((SIZE, SIZE), np.uint8)
    geometry = moved.geometry
    geometry.resample(pixels[..., 0], Box(0, 0, SIZE, SIZE), (u[0], u[1], 0.5 + 3 / SIZE / 2, 0.5, u[4]), out)
    np.testing.assert_array_equal(out[:, 3:], pixels[:, :-3, 0])  # three to the right, and what is new is mirrored
    np.testing.assert_array_equal(out[:, :3], pixels[:, 2::-1, 0])


# ---- decoding at a part of the size


@pytest.mark.parametrize(("height", "width"), [(1024, 1024), (1031, 871), (905, 1301), (2000, 2303)])
def test_a_part_of_the_size_cannot_be_seen(monkeypatch, height, width):
    """Against full decode: what is scaled, and that it is, for sides that are no multiples of 8 too."""
    data = jpeg(smooth(height, width, 1, seed=3))
    still = xray(shift=0.0, rotation=20.0, scale=(1.0, 1.0), flip=0.0)
    evaluation = build_fused("xray", False, SIZE)
    assert evaluation is not None
    scaled = [run(fused, data) for fused in (still, evaluation)]
    from scaletransfer import fused as module

    used = []
    original = module.decode_at

    def note(data: bytes, channels: int, how: Decoding, scale: int, *rest) -> np.ndarray:
        used.append(scale)
        return original(data, channels, how, scale, *rest)

    monkeypatch.setattr(module, "decode_at", note)
    run(still, data)
    assert used[-1] == max(s for s in (1, 2, 4, 8) if min(height, width) >= 2 * s * SIZE) > 1

    def in_full(data: bytes, channels: int, how: Decoding, *_) -> np.ndarray:
        return original(data, channels, how)

    monkeypatch.setattr(module, "plain_jpeg", lambda data: None)
    monkeypatch.setattr(module, "decode_at", in_full)
    whole = [run(fused, data) for fused in (still, evaluation)]
    # the mirrored border may lie up to half a pixel aside
    assert psnr(scaled[0], whole[0], edge=SIZE // 5) > 50
    assert psnr(scaled[1], whole[1], edge=1) > 50 and psnr(scaled[1], whole[1]) > 46


# ---- what is drawn


def test_crops_have_torchvisions_distribution():
    """Area and proportion of 4,000 crops against RandomResizedCrop.get_params."""
    from torchvision.transforms import RandomResizedCrop

    ours = [RandomCrop(size=SIZE, flip=0.5).used(300, 400, sample_uniforms(7, k)) for k in range(4000)]
    torch.manual_seed(0)
    picture = torch.empty(3, 300, 400)
    theirs = [Box(*RandomResizedCrop.get_params(picture, [0.08, 1.0], [3 / 4, 4 / 3])) for _ in range(4000)]
    for measure in (
        lambda box: box.height * box.width / (300 * 400),
        lambda box: np.log(box.width / box.height),
        lambda box: box.top / max(1, 300 - box.height),
        lambda box: box.left / max(1, 400 - box.width),
    ):
        one, two = (np.sort([measure(box) for box in boxes]) for boxes in (ours, theirs))
        # Kolmogorov-Smirnov, 0.1 % for two samples of 4,000
        places = np.concatenate([one, two])
        steps = [np.searchsorted(x, places, side="right") / len(x) for x in (one, two)]
        assert np.abs(steps[0] - steps[1]).max() < 1.95 * np.sqrt(2 / 4000)


def test_the_affine_draws_over_the_whole_range():
    u = np.array([sample_uniforms(3, position) for position in range(4000)])
    assert u.min() >= 0 and u.max() < 1
    assert np.abs(u.mean(axis=0) - 0.5).max() < 5 * np.sqrt(1 / 12 / 4000)
    assert np.abs(np.corrcoef(u.T) - np.eye(32)).max() < 5.5 / np.sqrt(4000)


@settings(max_examples=200, deadline=None)
@given(height=st.integers(1, 400), width=st.integers(1, 400), position=st.integers(0, 2**40))
def test_every_crop_lies_inside(height, width, position):
    box = RandomCrop(size=SIZE, flip=0.5).used(height, width, sample_uniforms(0, position))
    assert box.height >= 1 and box.width >= 1 and box.top >= 0 and box.left >= 0
    assert box.top + box.height <= height and box.left + box.width <= width


# ---- whatever comes


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300), position=st.integers(0, 1000))
def test_any_size_gives_the_wanted_one(height, width, position):
    grey, colour = jpeg(smooth(height, width, 1)), jpeg(smooth(height, width, 3))
    for fused in (xray(), build_fused("xray", False, SIZE), build_fused("natural", True, SIZE)):
        assert fused is not None
        for data in (grey, colour):
            out = run(fused, data, position)
            assert out.shape == (fused.channels, SIZE, SIZE)


def test_16_bits_are_those_of_8_bits_scaled():
    pixels = smooth(90, 100, 1)
    deep = png(pixels.astype(np.uint16) * 257)
    for fused in (xray(), build_fused("xray", False, SIZE)):
        assert fused is not None
        wide = run(fused, deep, 5, Decoding(depth=16))
        assert wide.dtype == np.uint16
        assert np.abs(wide / 257.0 - run(fused, png(pixels), 5)).max() < 1.5
    natural = build_fused("natural", True, SIZE)
    assert natural is not None
    with pytest.raises(ValueError, match="16-bit image"):
        run(natural, deep, 0, Decoding(depth=16))


def test_the_same_place_gives_the_same_bytes_and_another_does_not():
    data = jpeg(smooth(300, 260, 1))
    assert np.array_equal(run(xray(), data, 4), run(xray(), data, 4))
    assert not np.array_equal(run(xray(), data, 4), run(xray(), data, 5))


def test_broken_images_have_a_reason():
    data = jpeg(smooth(1500, 1500, 1))
    for broken in (data[: len(data) // 2], b"", b"no picture"):
        with pytest.raises(ValueError, match=r"truncated|empty|known format"):
            run(xray(), broken)


def test_which_pipelines_have_a_fused_form():
    assert isinstance(xray().geometry, SquareAffine)
    evaluation = build_fused("xray", False, SIZE)
    assert evaluation is not None and isinstance(evaluation.geometry, CentreSquare)
    assert build_fused("natural", False, SIZE) is None  # torchvision's to the pixel
    assert build_fused("natural", True, SIZE, options=TransformOptions(randaugment=True)) is None
    corrected, paper = xray("corrected").geometry, xray("paper").geometry
    assert isinstance(corrected, SquareAffine) and isinstance(paper, SquareAffine)
    assert (corrected.shift, corrected.flip) == (0.15, 0.0) and (paper.shift, paper.flip) == (0.25, 0.5)
    for arguments in (("other", True, 8), ("xray", True, 0), ("xray", True, 8, "mine")):
        with pytest.raises(ValueError, match=r"^transform (kind|size|protocol) must be"):
            build_fused(*arguments)
    with pytest.raises(ValueError, match="randaugment is for natural images"):
        build_fused("xray", True, 8, options=TransformOptions(randaugment=True))


@pytest.mark.parametrize(
    "geometry",
    [
        CentreSquare(size=SIZE),
        SquareAffine(size=SIZE, shift=0.1, rotation=20, scale=(0.8, 1.2), flip=0.5),
        RandomCrop(size=SIZE, flip=0.5),
    ],
    ids=lambda geometry: type(geometry).__name__,
)
def test_a_geometry_uses_no_more_numbers_than_it_says(geometry: Geometry):
    fused = Fused(geometry=geometry, channels=1)
    data = jpeg(smooth(300, 260, 1))
    for position in range(200):  # a crop that fits at the first try uses few of them
        got, wanted = (np.empty((1, geometry.size, geometry.size), np.uint8) for _ in range(2))
        few, all_of_them = sample_uniforms(1, position, geometry.draws), sample_uniforms(1, position)
        assert few == all_of_them[: geometry.draws]
        fused(data, Decoding(), few, got)
        fused(data, Decoding(), all_of_them, wanted)
        np.testing.assert_array_equal(got, wanted)


def test_unlucky_crops_use_every_number_they_may():
    crop = RandomCrop(size=SIZE, flip=0.5)
    numbers = [0.99] * crop.draws  # never fits in something so narrow
    assert crop.used(1000, 10, numbers) == Box(493, 0, 13, 10)
    with pytest.raises(IndexError):
        crop.used(1000, 10, numbers[:-1])

"""Pipelines: what they draw, what they compute, and that a seed decides everything."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from scaletransfer.transforms import Normalizer, ReflectedAffine, TransformOptions, build_transform, seeded


def _smooth(height: int, width: int, top: float = 255.0, seed: int = 0) -> np.ndarray:
    """A grey picture without sharp edges, float64 in [0, top]."""
    noise = np.random.default_rng(seed).random((height, width))
    picture = ndimage.gaussian_filter(noise, 3, mode="reflect")
    picture -= picture.min()
    return picture / picture.max() * top


def _draws(protocol: str, count: int = 4000) -> dict[str, np.ndarray]:
    affine = build_transform("xray", True, 32, protocol).transforms[-1]  # type: ignore[attr-defined,arg-type]
    assert isinstance(affine, ReflectedAffine)
    with seeded(0):
        drawn = [affine.make_params([]) for _ in range(count)]
    return {name: np.array([d[name] for d in drawn], dtype=np.float64) for name in drawn[0]}


@pytest.mark.parametrize(("protocol", "shift", "flip"), [("paper", 0.25, 0.5), ("corrected", 0.15, 0.0)])
def test_distributions_of_the_protocol(protocol: str, shift: float, flip: float) -> None:
    drawn = _draws(protocol)
    for name, low, high in [
        ("angle", -45, 45),
        ("zoom", 0.9, 1.1),
        ("dx", -shift, shift),
        ("dy", -shift, shift),
    ]:
        values, width = drawn[name], high - low
        assert low <= values.min() < low + 0.01 * width and high - 0.01 * width < values.max() <= high, name
        # Uniform: mean and deviation within five standard errors.
        assert abs(values.mean() - (low + high) / 2) < 5 * width / 12**0.5 / 4000**0.5, name
        assert abs(values.std() - width / 12**0.5) < 0.02 * width, name
    assert abs(drawn["flip"].mean() - flip) < 0.04 and (flip > 0 or not drawn["flip"].any())
    table = np.corrcoef([drawn[name] for name in ("angle", "zoom", "dx", "dy")])
    assert abs(table - np.eye(4)).max() < 0.08, "draws must be independent"


def test_options_replace_the_protocols_values() -> None:
    options = TransformOptions(shift=0.0, rotation=0.0, scale=(1.0, 1.0), flip=0.0)
    picture = torch.from_numpy(_smooth(40, 40).astype(np.uint8))[None]
    assert torch.equal(build_transform("xray", True, 40, "paper", options)(picture), picture)


def _scipy_reference(picture: np.ndarray, params: dict[str, float]) -> np.ndarray:
    """The same map in pixel indexes: out = centre + zoom * R * flip * (in - centre) + shift * side."""
    height, width = picture.shape
    angle = np.deg2rad(params["angle"])
    # (x, y), y down; from input to output.
    forward = params["zoom"] * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    forward = forward @ np.diag([-1.0 if params["flip"] else 1.0, 1.0])
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    shift = np.array([params["dx"] * width, params["dy"] * height])
    backward = np.linalg.inv(forward)
    offset = centre - backward @ (centre + shift)
    swap = np.array([[0, 1], [1, 0]])  # scipy's order is (y, x)
    return ndimage.affine_transform(picture, swap @ backward @ swap, swap @ offset, order=1, mode="reflect")


@pytest.mark.parametrize(
    "params",
    [
        {"angle": 0.0, "zoom": 1.0, "dx": 0.25, "dy": 0.0, "flip": False},
        {"angle": 0.0, "zoom": 1.0, "dx": 0.0, "dy": -0.125, "flip": True},
        {"angle": 37.0, "zoom": 1.0, "dx": 0.0, "dy": 0.0, "flip": False},
        {"angle": -45.0, "zoom": 0.9, "dx": 0.21, "dy": -0.17, "flip": True},
        {"angle": 12.5, "zoom": 1.1, "dx": -0.25, "dy": 0.25, "flip": False},
    ],
)
@pytest.mark.parametrize(("dtype", "top", "tolerance"), [(np.uint8, 255.0, 1), (np.uint16, 65535.0, 16)])
@pytest.mark.parametrize("shape", [(64, 64), (48, 80)])
def test_affine_equals_scipy_with_reflected_border(
    params: dict[str, float], dtype: type, top: float, tolerance: int, shape: tuple[int, int]
) -> None:
    picture = _smooth(*shape, top).astype(dtype)
    affine = ReflectedAffine(shift=0, rotation=0, scale=(1, 1), flip=0)
    result = affine.transform(torch.from_numpy(picture)[None], params)
    expected = _scipy_reference(picture.astype(np.float64), params)
    assert result.shape == (1, *shape) and result.numpy().dtype == dtype
    difference = abs(result[0].numpy().astype(np.float64) - np.round(expected))
    assert difference.max() <= tolerance
    if dtype == np.uint8:
        assert (difference > 0).mean() < 0.02, "only values half way between two integers may round differently"


def test_signs_of_the_affine() -> None:
    """A positive dx moves to the right, dy down, a positive angle turns clockwise on the screen."""
    picture = torch.zeros(1, 64, 64, dtype=torch.uint8)
    picture[0, 32, 48] = 255
    affine = ReflectedAffine(shift=0, rotation=0, scale=(1, 1), flip=0)
    still = {"angle": 0.0, "zoom": 1.0, "dx": 0.0, "dy": 0.0, "flip": False}

    def brightest(**change: float) -> tuple[int, int]:
        moved = affine.transform(picture, still | change)[0]
        row, column = divmod(int(moved.argmax()), 64)
        return row, column

    assert brightest() == (32, 48)
    assert brightest(dx=0.125) == (32, 56)
    assert brightest(dy=0.125) == (40, 48)
    assert brightest(flip=True) == (32, 15)
    assert brightest(angle=90.0) == (48, 31)
    assert brightest(zoom=0.5) in {(32, 39), (32, 40), (31, 39), (31, 40)}


@pytest.mark.parametrize("kind", ["xray", "natural"])
def test_a_seed_decides_every_byte_and_nothing_else_does(kind: str) -> None:
    options = TransformOptions(randaugment=True) if kind == "natural" else None
    transform = build_transform(kind, True, 48, "paper", options)  # type: ignore[arg-type]
    image = Image.fromarray(_smooth(100, 80).astype(np.uint8)).convert("RGB")

    def run(seed: int) -> Tensor:
        with seeded(seed):
            return transform(image)

    results = []
    for noise in range(3):
        torch.manual_seed(noise)
        np.random.seed(noise)
        random.seed(noise)
        torch.rand(noise)
        results.append([run(seed) for seed in range(10)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    distinct = {r.numpy().tobytes() for r in results[0]}
    assert len(distinct) == 10


def test_seeded_leaves_the_generator_as_it_was() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with seeded(9):
        inside = torch.rand(4)
    assert torch.equal(torch.rand(4), expected)
    with pytest.raises(RuntimeError, match="on purpose"), seeded(9):
        assert torch.equal(torch.rand(4), inside)
        raise RuntimeError("on purpose")
    with seeded(2**63 - 1):
        torch.rand(1)


@pytest.mark.parametrize("kind", ["xray", "natural"])
def test_evaluation_draws_nothing(kind: str) -> None:
    transform = build_transform(kind, False, 56)  # type: ignore[arg-type]
    image = Image.fromarray(_smooth(100, 80).astype(np.uint8))
    state = torch.get_rng_state()
    first, second = transform(image), transform(image)
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)
    assert first.dtype == torch.uint8 and first.shape == ((1 if kind == "xray" else 3), 56, 56)


def test_xray_evaluation_is_the_centre_square_resized_with_antialiasing() -> None:
    picture = np.round(_smooth(128, 192)).astype(np.uint8)
    square = Image.fromarray(picture[:, 32:160])
    for size in (32, 50, 200):
        expected = np.asarray(square.resize((size, size), Image.Resampling.BILINEAR)).astype(int)
        for array, wanted in ((picture, expected), (picture.T.copy(), expected.T)):
            result = build_transform("xray", False, size)(array)[0].numpy().astype(int)
            assert abs(result - wanted).max() <= 1
    assert build_transform("xray", False, 8)(np.arange(9 * 8, dtype=np.uint8).reshape(9, 8))[0, 0, 0] == 0


def test_natural_evaluation_is_resize_then_centre_crop() -> None:
    image = Image.fromarray(np.stack([_smooth(150, 120, seed=s).astype(np.uint8) for s in range(3)], -1))
    result = build_transform("natural", False, 112)(image)
    # 112 * 256 / 224 = 128: the short side becomes 128, the long one 160.
    resized = np.asarray(image.resize((128, 160), Image.Resampling.BILINEAR)).astype(int)
    expected = resized[24:136, 8:120].transpose(2, 0, 1)
    assert abs(result.numpy().astype(int) - expected).max() <= 1


def test_16_bit_stays_16_bit_and_equals_8_bit_scaled() -> None:
    eight = np.round(_smooth(90, 70)).astype(np.uint8)
    sixteen = eight.astype(np.uint16) * 257
    for train in (False, True):
        transform = build_transform("xray", train, 48, "paper")
        with seeded(4):
            low = transform(eight)
        for image in (sixteen, Image.fromarray(sixteen), torch.from_numpy(sixteen), sixteen.astype(">u2")):
            with seeded(4):
                high = transform(image)
            assert high.dtype == torch.uint16 and high.shape == (1, 48, 48)
            assert abs(high.float() / 257 - low.float()).max() < 1.6
    deep = build_transform("xray", False, 48)(np.round(_smooth(90, 70, 65535)).astype(np.uint16)).numpy()
    assert len(np.unique(deep)) > 1000, "16-bit pictures must keep more than 256 levels"


def test_extreme_pixels_do_not_wrap() -> None:
    for dtype in (np.uint8, np.uint16):
        picture = np.zeros((60, 60), dtype=dtype)
        picture[:, 30:] = np.iinfo(dtype).max
        for seed in range(5):
            with seeded(seed):
                result = build_transform("xray", True, 40, "paper")(picture)
            values = result.float() / np.iinfo(dtype).max
            # Away from the edge both plateaus stay exact; a wrapped value would scatter.
            assert ((values == 0) | (values == 1)).float().mean() > 0.8


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_pillow_modes(mode: str) -> None:
    image = Image.fromarray(np.round(_smooth(30, 30)).astype(np.uint8)).convert(mode)
    assert torch.equal(build_transform("xray", False, 30)(image)[0], torch.from_numpy(np.array(image.convert("L"))))
    # 26 * 256 / 224 is 30: nothing is resized, two pixels are cut off on each side.
    rgb = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(build_transform("natural", False, 26)(image), rgb[:, 2:28, 2:28])
    assert build_transform("natural", True, 30)(image).shape == (3, 30, 30)


def test_arrays_and_tensors_of_any_channels() -> None:
    grey = np.round(_smooth(30, 30)).astype(np.uint8)
    rgb = np.stack([grey, grey // 2, 255 - grey], -1)
    transform = build_transform("xray", False, 30)
    expected = np.asarray(Image.fromarray(rgb).convert("L")).astype(int)
    for image in (rgb, torch.from_numpy(rgb).permute(2, 0, 1), np.concatenate([rgb, rgb[..., :1]], -1)):
        assert abs(transform(image)[0].numpy().astype(int) - expected).max() <= 1
    for image in (grey, grey[..., None], torch.from_numpy(grey), np.stack([grey, 255 - grey], -1)):
        assert torch.equal(transform(image)[0], torch.from_numpy(grey))
    assert build_transform("natural", False, 30)(grey).shape == (3, 30, 30)


def test_natural_training_crops_flips_and_augments() -> None:
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    transform = build_transform("natural", True, 32, options=TransformOptions(flip=0.5))
    rising, spans = 0, []
    for seed in range(200):
        with seeded(seed):
            row = transform(ramp)[0, 16].float()
        rising += int(row[-1] > row[0])
        spans.append(abs(row[-1] - row[0]).item())
    assert 70 < rising < 130, "half of the pictures are flipped"
    assert min(spans) < 100 < 200 < max(spans), "crops have all sizes"
    augmented = build_transform("natural", True, 32, options=TransformOptions(randaugment=True))
    assert [type(s).__name__ for s in augmented.transforms[-1:]] == ["RandAugment"]  # type: ignore[attr-defined]
    changed = 0
    for seed in range(20):
        with seeded(seed):
            plain = transform(ramp)
        with seeded(seed):
            changed += int(not torch.equal(augmented(ramp), plain))
    assert changed > 10


def test_normalizer() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    out = Normalizer(0.5, 0.5)(images)
    assert out.dtype == torch.float32 and out.shape == images.shape
    assert out.min() == -1 and out.max() == 1
    deep = torch.tensor([0, 32768, 65535], dtype=torch.uint16).reshape(1, 1, 1, 3)
    assert torch.allclose(Normalizer(0.5, 0.25, 65535)(deep).flatten(), torch.tensor([-2.0, 2 / 65535, 2.0]), atol=1e-7)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    colour = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = (colour.numpy() / 255.0 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    normalizer = Normalizer(mean, std)
    assert abs(normalizer(colour).numpy() - expected).max() < 1e-6
    assert normalizer(images).shape == (1, 3, 16, 16)
    assert not normalizer.state_dict()


def test_refusals() -> None:
    for arguments, message in [
        (("ct", True, 32), "kind must be xray or natural, not 'ct'"),
        (("xray", True, 32, "published"), "protocol must be paper or corrected"),
        (("xray", True, 0), "size must be 1"),
        (("xray", True, 32, "paper", TransformOptions(randaugment=True)), "randaugment is for natural"),
        (("natural", True, 32, "paper", TransformOptions(shift=0.1)), "shift is for X-rays"),
    ]:
        with pytest.raises(ValueError, match=message):
            build_transform(*arguments)  # type: ignore[arg-type]
    for bad in (
        {"shift": 1.5},
        {"rotation": -1},
        {"scale": (1.1, 0.9)},
        {"flip": 2},
        {"randaugment_ops": 0},
        {"randaugment_magnitude": 31},
    ):
        with pytest.raises(ValueError, match=f"transform .*{next(iter(bad))}"):
            TransformOptions(**bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="16-bit image"):
        build_transform("natural", False, 8)(np.zeros((9, 9), dtype=np.uint16))
    for image in (np.zeros((4, 4)), torch.zeros(1, 4, 4), np.full((4, 4), -1, dtype=np.int32), "picture.png"):
        with pytest.raises(ValueError, match="8 or 16 bits"):
            build_transform("xray", False, 8)(image)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 to 4 channels"):
        build_transform("xray", False, 8)(np.zeros((4, 4, 7), dtype=np.uint8))
    with pytest.raises(ValueError, match="above 0"):
        Normalizer(0.5, 0.0)
    with pytest.raises(ValueError, match="2 means but 3 deviations"):
        Normalizer([0, 1], [1, 1, 1])

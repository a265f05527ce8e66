"""Decoded images that runs share: the same training, bit for bit, and never a stale or half-written pixel."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import SALT, draw_image, make_chexpert, make_image_folder
from helpers_transfer import config, losses, make_pretrained

from scaletransfer import decoded, loader
from scaletransfer.config import FinetuneConfig
from scaletransfer.decoded import StoredDataset, taken_by
from scaletransfer.finetune import finetune
from scaletransfer.loader import ShardDataset
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import open_source
from scaletransfer.transfer.plan import make_plan
from scaletransfer.transfer.run import datasets
from scaletransfer.transforms import bit_resize, bit_transform, seeded


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images") / "animals", per_class=3)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    return make_pretrained(tmp_path_factory.mktemp("models") / "pre")


@pytest.fixture
def decodings(monkeypatch) -> list[int]:
    """One entry for every image that is decoded in this process."""
    counted: list[int] = []
    right = loader.decode_at

    def counting(*args, **options):
        counted.append(1)
        return right(*args, **options)

    for module in (loader, decoded):
        monkeypatch.setattr(module, "decode_at", counting)
    return counted


@pytest.mark.parametrize("shape", [(1, 50, 40), (3, 40, 90), (3, 10, 120), (3, 32, 32)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
@pytest.mark.parametrize("square", [True, False])
def test_the_transform_gives_the_same_for_the_resized_image(shape, dtype, square):
    top = 255 if dtype == torch.uint8 else 65535
    whole = torch.from_numpy(
        np.random.default_rng(0).integers(0, top + 1, shape[1:] + shape[:1]).astype(f"u{dtype.itemsize}")
    )
    for picture in (whole.movedim(-1, 0), whole.movedim(-1, 0).contiguous()):  # as decoders give it, and not
        for train in (True, False):
            transform = bit_transform(train, 36, 32, square=square, flip=0.5)
            resized = bit_resize(picture, train, 36, 32, square=square)
            assert (resized is None) == (train and not square and shape == (3, 10, 120))
            for seed in range(4 if resized is not None else 0):
                with seeded(seed):
                    direct = transform(picture)
                with seeded(seed):
                    assert torch.equal(transform(resized), direct)


@pytest.mark.parametrize("protocol", ["bit", "paper"])
def test_a_run_is_bit_equal_with_and_without_the_store(images, pretrained, tmp_path, protocol, decodings):
    common = [f"data.images={images}", f"model.path={pretrained}", f"protocol={protocol}"]
    finetune(tmp_path / "plain", config(*common))
    plain = len(decodings)
    cached = [*common, f"data.cache={tmp_path / 'cache'}"]
    for name, expected in (("filling", 18), ("filled", 0)):  # 9 training and 9 validation images
        decodings.clear()
        finetune(tmp_path / name, config(*cached))
        assert len(decodings) == expected < plain
        for file in ("model/model.safetensors", "predictions.csv", "selection.json", "result.json"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), file
        assert losses(tmp_path / name) == losses(tmp_path / "plain")


def batches(cfg: FinetuneConfig) -> list[np.ndarray]:
    """Images of the first two training batches and of validation."""
    train, valid = datasets(make_plan(cfg))
    return [train.__getitems__(range(16))["image"].numpy(), valid.__getitems__(range(len(valid)))["image"].numpy()]


def test_shards_and_16_bit_images(tmp_path, pretrained, decodings):
    xrays = make_chexpert(tmp_path / "CheXpert-v1.0", rows=9, valid=4, laterals=False)
    build(plan_shards(open_source("chexpert", xrays), SALT), tmp_path / "shards")
    make_image_folder(tmp_path / "deep", per_class=2, suffix=".png", mode="I;16")
    for key, folder in (("shards", "shards"), ("images", "deep")):
        common = [f"data.{key}={tmp_path / folder}", f"model.path={pretrained}", "model.head=new"]
        plain = batches(config(*common))
        for _ in range(2):
            decodings.clear()
            stored = batches(config(*common, f"data.cache={tmp_path / 'cache'}"))
            assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(plain, stored, strict=True))
        assert not decodings


def test_workers_fill_the_store(images, pretrained, tmp_path, decodings):
    cfg = config(
        f"data.images={images}", f"model.path={pretrained}", f"data.cache={tmp_path / 'cache'}", "data.workers=2"
    )
    finetune(tmp_path / "run", cfg)
    decodings.clear()
    batches(cfg)
    assert not decodings


def test_an_image_that_was_replaced_is_decoded_again(tmp_path, pretrained, decodings):
    images = make_image_folder(tmp_path / "animals", per_class=2, suffix=".bmp")
    cfg = config(f"data.images={images}", f"model.path={pretrained}", f"data.cache={tmp_path / 'cache'}")
    first = batches(cfg)[1]
    path = images / "val" / "cat" / "img_0.bmp"
    size = path.stat().st_size
    draw_image(path, 12345, mode="RGB")
    assert path.stat().st_size == size
    decodings.clear()
    second = batches(cfg)[1]
    assert len(decodings) == 1 and np.sum(np.any(first != second, axis=(1, 2, 3))) == 1


def stored(images: Path, pretrained: Path, cache: Path, *more: str) -> StoredDataset:
    """The validation data of a run with a store."""
    cfg = config(f"data.images={images}", f"model.path={pretrained}", f"data.cache={cache}", *more)
    valid = datasets(make_plan(cfg))[1]
    assert isinstance(valid, StoredDataset)
    return valid


def test_damage_is_no_image(images, pretrained, tmp_path, decodings):
    """Every byte of a slot counts; what a crash or another host leaves half-written is decoded again."""
    data = stored(images, pretrained, tmp_path)
    right = data.__getitems__(range(len(data)))["image"].numpy()
    raw = bytearray(data.store.path.read_bytes())
    slot = data.store.stride
    for row, place in enumerate((0, 5, 9, 20, 64, 64 + 3 * 32 * 32 - 1)):
        raw[row * slot + place] ^= 1
    raw[6 * slot + 100 : 7 * slot] = bytes(slot - 100)
    data.store.path.write_bytes(raw[: 8 * slot + 200])
    decodings.clear()
    again = stored(images, pretrained, tmp_path).__getitems__(range(len(data)))["image"].numpy()
    assert np.array_equal(right, again) and len(decodings) == 8


def test_a_budget_is_kept(images, pretrained, tmp_path, capsys, decodings):
    data = stored(images, pretrained, tmp_path, "data.cache_gb=1e-5")  # two images of 3,072 bytes on pages of 4,096
    plain = ShardDataset(data.sources, None, data.transform, data.channels, 0, depth=data.depth)
    for _ in range(2):
        decodings.clear()
        got = data.__getitems__(range(len(data)))["image"].numpy()
    assert np.array_equal(got, plain.__getitems__(range(len(data)))["image"].numpy())
    assert 0 < taken_by(tmp_path) <= 1e4 and capsys.readouterr().err.count("data.cache_gb=1e-05 is used up") == 1


def test_a_full_disk_ends_filling_alone(images, pretrained, tmp_path, monkeypatch, capsys):
    data = stored(images, pretrained, tmp_path)

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(decoded.os, "pwritev", full)
    assert len(data.__getitems__(range(len(data)))["image"]) == len(data)
    assert "No space left on device" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(images, pretrained, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data.cache \S+file/x cannot be written"):
        stored(images, pretrained, tmp_path / "file" / "x")

"""Batches from shards: pixels, labels and keys, the same whoever reads them, and one sentence where they cannot."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import SALT, draw_image, make_chexpert, make_image_folder
from helpers_loader import POLICY, SIZE, Findings, by_position, dataset, small_chexpert, small_shards, source
from PIL import Image

from scaletransfer import fused, keys, labels, shard_reader
from scaletransfer.index import ShardIndex, from_records, load_index
from scaletransfer.loader import (
    Batch,
    EvalSampler,
    ShardDataset,
    StepSampler,
    target_names,
)
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import open_source
from scaletransfer.streams import batches, make_loader


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return small_chexpert(tmp_path_factory.mktemp("loader"))


@pytest.fixture(scope="module")
def shards(root) -> Path:
    return small_shards(root)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("pictures")
    root = make_image_folder(base / "images", per_class=5)
    build(plan_shards(open_source("image_folder", root), SALT, shard_size=4), base / "shards")
    return base


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> ShardIndex:
    root = tmp_path_factory.mktemp("other")
    for number in range(12):
        draw_image(root / f"{number}.jpg", 900 + number)
    return from_records(Findings(root), SALT)


# ---- what a batch holds


def test_types_and_shapes_multilabel(shards):
    data = dataset([source(load_index(shards))])
    batch = data.__getitems__(list(range(6)))
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (6, 1, SIZE, SIZE)
    assert batch["target"].dtype == torch.float32 and batch["target"].shape == (6, 13)
    values = batch["target"]
    assert torch.isnan(values).any() and set(values[~torch.isnan(values)].tolist()) == {0.0, 1.0}
    assert batch["position"].dtype == batch["key"].dtype == torch.int64
    assert batch["position"].tolist() == list(range(6))
    assert batch["bytes"].ndim == 0
    assert len(data) == 52


def test_types_and_shapes_multiclass(pictures):
    index = load_index(pictures / "shards")
    batch = dataset([source(index)], kind="natural").__getitems__(list(range(5)))
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (5, 3, SIZE, SIZE)
    assert batch["target"].dtype == torch.int64 and batch["target"].shape == (5,)


def decoded_grey(path: Path) -> np.ndarray:
    """The evaluation pipeline without us: Pillow, centre square, the mean over the area of each new pixel."""
    picture = Image.open(path).convert("L")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = np.asarray(picture.crop((left, top, left + side, top + side)), dtype=np.float64)
    edges = np.arange(SIZE + 1) * side / SIZE
    pixel = np.arange(side)
    covered = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    weights = np.maximum(0, covered) * SIZE / side
    return np.rint(weights @ square @ weights.T).astype(np.int16)


def test_validation_images_labels_and_keys_are_those_of_the_files(root, shards):
    """Against Pillow; tolerance: JPEG decoders may differ by one level a pixel, and the mean is rounded."""
    index = load_index(shards)
    data = dataset([source(index, "valid")], train=False)
    stream = list(make_loader(data, EvalSampler(11, 0, 1, 4), 0))
    records = {keys.key("chexpert", r.source_id, SALT): r for r in open_source("chexpert", root) if r.split == "valid"}
    names = labels.CHEXPERT_RAW
    seen = set()
    for batch in stream:
        for row, position in enumerate(batch["position"].tolist()):
            key = f"chexpert-{int(batch['key'][row]) & (2**64 - 1):016x}"
            record = records[key]
            assert key == index.keys("valid", [position])[0]
            difference = np.abs(batch["image"][row, 0].numpy().astype(np.int16) - decoded_grey(root / record.image))
            assert difference.max() <= 2 and difference.mean() < 0.6
            raw = np.array([record.labels], dtype=np.int8)
            expected = labels.targets(raw, names, "chexpert", POLICY)[0]
            np.testing.assert_array_equal(batch["target"][row].numpy(), expected)
            seen.add(key)
    assert seen == set(records)


def test_natural_validation_images_are_those_of_the_files(pictures):
    index = load_index(pictures / "shards")
    images = open_source("image_folder", pictures / "images")
    records = {keys.key("image_folder", r.source_id, SALT): r for r in images if r.split == "valid"}
    data = dataset([source(index, "valid")], train=False, kind="natural")
    batch = data.__getitems__(list(range(len(data))))
    side = round(SIZE * 256 / 224)
    for row, key in enumerate(index.keys("valid", slice(None))):
        picture = Image.open(pictures / "images" / records[key].image).convert("RGB")  # 48 x 40
        resized = picture.resize((int(side * picture.width / picture.height), side), Image.Resampling.BILINEAR)
        left, top = round((resized.width - SIZE) / 2), round((side - SIZE) / 2)
        expected = np.asarray(resized.crop((left, top, left + SIZE, top + SIZE)), dtype=np.int16)
        difference = np.abs(batch["image"][row].permute(1, 2, 0).numpy().astype(np.int16) - expected)
        assert difference.max() <= 4 and difference.mean() < 1  # chroma upsampling differs a little more
        assert int(batch["target"][row]) == records[key].labels


def test_bytes_are_counted(shards):
    index = load_index(shards)
    data = dataset([source(index)])
    _, row = data.order.locate(np.arange(12))
    assert int(data.__getitems__(list(range(12)))["bytes"]) == index.table("train")["size"][row].sum()


def test_memory_of_a_batch_is_used_again_when_nobody_holds_it(shards):
    data = dataset([source(load_index(shards))])
    held = [data.__getitems__([first, first + 1]) for first in range(0, 10, 2)]
    part = data.__getitems__([10, 11])["image"][1:]  # a view holds it too
    assert len({batch["image"].data_ptr() for batch in held} | {part.data_ptr()}) == 6
    wanted = part.clone()
    place = held.pop()["image"].data_ptr()
    again = data.__getitems__([20, 21])["image"]
    assert again.data_ptr() == place
    other = dataset([source(load_index(shards))])
    for first, batch in zip(range(0, 8, 2), held, strict=True):
        assert torch.equal(batch["image"], other.__getitems__([first, first + 1])["image"])
    assert torch.equal(part, wanted) and torch.equal(again, other.__getitems__([20, 21])["image"])


def test_16_bits_stay_16_bits(tmp_path):
    root = make_chexpert(tmp_path / "CheXpert-v1.0", rows=6, valid=2, laterals=False, suffix=".png")
    deep = {}
    for number, record in enumerate(open_source("chexpert", root)):
        draw_image(root / record.image, 50 + number, mode="I;16", width=SIZE, height=SIZE)
        deep[keys.key("chexpert", record.source_id, SALT)] = np.asarray(Image.open(root / record.image))
    build(plan_shards(open_source("chexpert", root), SALT), tmp_path / "shards")
    index = load_index(tmp_path / "shards")
    assert index.image.bit_depth == 16
    batch = dataset([source(index, "valid")], train=False).__getitems__([0, 1])
    assert batch["image"].dtype == torch.uint16 and batch["image"].shape == (2, 1, SIZE, SIZE)
    for row, key in enumerate(index.keys("valid", [0, 1])):
        np.testing.assert_array_equal(batch["image"][row, 0].numpy(), deep[key])  # PNG, of the right size: exact
    assert batch["image"].to(torch.int32).max() > 255
    training = dataset([source(index)], batch=2).__getitems__([0, 1, 2])
    assert training["image"].dtype == torch.uint16 and training["image"].to(torch.int32).max() > 255


@pytest.mark.parametrize("depth", [None, 8, 16])
def test_depth_decides_the_bits_of_loose_files(tmp_path, depth):
    """A folder of 8- and 16-bit grey images gives batches of one type; None is the depth of its index."""
    for number in range(4):
        draw_image(tmp_path / f"{number}.png", number, mode="I;16" if number % 2 else "L")
        (tmp_path / f"{number}.png").rename(tmp_path / f"{number}.jpg")  # the name decides nothing
    index = from_records(Findings(tmp_path, count=4), SALT)
    assert (index.image.channels, index.image.bit_depth) == (1, 16)
    data = ShardDataset([source(index)], None, lambda image: image[:, :40, :40], 1, 0, depth=depth)
    images = data.__getitems__([0, 1, 2, 3])["image"]
    assert images.dtype == (torch.uint8 if depth == 8 else torch.uint16)
    for number in range(4):
        pixels = np.asarray(Image.open(tmp_path / f"{number}.jpg"), dtype=np.int64)[:40, :40]
        wanted = pixels * (1 if number % 2 else 257)
        np.testing.assert_array_equal(images[number, 0].numpy(), np.round(wanted / 257) if depth == 8 else wanted)


def test_16_bits_are_refused_for_natural_images(tmp_path):
    for number in range(12):
        draw_image(tmp_path / f"{number}.png", number, mode="I;16")
        (tmp_path / f"{number}.png").rename(tmp_path / f"{number}.jpg")
    with pytest.raises(ValueError, match="16-bit image was given to the pipeline for natural images"):
        dataset([source(from_records(Findings(tmp_path), SALT))], kind="natural").__getitems__([0])


# ---- augmentation by position


def epoch(
    data: ShardDataset, rank: int, world: int, micro: int, workers: int, start: int = 0, kind: str = "auto"
) -> list[Batch]:
    batch = data.order.global_batch
    sampler = StepSampler(start, 2 * data.order.samples_per_epoch, rank, world, micro, batch)
    found = list(batches(make_loader(data, sampler, workers, kind)))
    assert len(found) == len(sampler) and all(len(b["position"]) == micro for b in found)
    return found


def test_images_depend_on_seed_and_position_only(shards):
    """0, 1 and 2 workers, 1 to 3 ranks, any micro-batch, whatever was drawn before: equal bytes by position."""
    data = dataset([source(load_index(shards))])
    expected = by_position(epoch(data, 0, 1, 12, 0))
    assert set(expected) == set(range(2 * 48))
    cases = [
        (1, 4, 1, "threads"),
        (1, 3, 2, "processes"),
        (2, 6, 0, "auto"),
        (2, 3, 2, "threads"),
        (3, 2, 1, "processes"),
    ]
    for world, micro, workers, kind in cases:
        torch.manual_seed(world * 100 + workers)  # the caller's generator must not matter
        found: dict[int, tuple[bytes, bytes, int]] = {}
        for rank in range(world):
            mine = by_position(epoch(data, rank, world, micro, workers, kind=kind))
            assert not found.keys() & mine.keys()
            found |= mine
        assert found == expected
    assert by_position(epoch(dataset([source(load_index(shards))], seed=6), 0, 1, 12, 0)) != expected


def test_the_same_image_is_drawn_differently_in_the_next_epoch(shards):
    data = dataset([source(load_index(shards))])
    images: dict[int, set[bytes]] = {}
    for image, _, key in by_position(epoch(data, 0, 1, 12, 0)).values():
        images.setdefault(key, set()).add(image)
    assert sum(len(found) == 2 for found in images.values()) >= 40  # 48 of 52 an epoch: 44 or more are in both


def test_reading_leaves_the_callers_generator_alone(shards):
    data = dataset([source(load_index(shards))])
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    data.__getitems__([0, 1, 2])
    assert torch.equal(torch.rand(3), expected)


def test_validation_draws_nothing(shards):
    index = load_index(shards)
    one = dataset([source(index, "valid")], train=False, seed=1).__getitems__(list(range(11)))
    two = dataset([source(index, "valid")], train=False, seed=2).__getitems__(list(range(11)))
    assert torch.equal(one["image"], two["image"])


def test_resuming_decodes_nothing_that_was_seen(shards, monkeypatch):
    data = dataset([source(load_index(shards))])
    whole = by_position(epoch(data, 1, 2, 3, 0))
    decoded = []
    original = fused.decode_at

    def count(data: bytes, *options) -> np.ndarray:
        decoded.append(len(data))
        return original(data, *options)

    monkeypatch.setattr(fused, "decode_at", count)
    resumed = by_position(epoch(data, 1, 2, 3, 0, start=36))
    assert resumed == {position: what for position, what in whole.items() if position >= 36}
    assert len(decoded) == len(resumed) == (96 - 36) // 2


# ---- several sources


def test_union_and_intersection(shards, other):
    chexpert = load_index(shards)
    assert target_names([chexpert, other], POLICY, "intersection", None) == ("Edema", "Effusion")
    union = target_names([chexpert, other], POLICY, "union", None)
    assert set(union) == {*labels.CHEXPERT_FINDINGS, "Hernia"} and list(union).count("Edema") == 1
    data = dataset([source(chexpert, names=union), source(other, names=union)], batch=16)
    hernia, edema, fracture = (union.index(name) for name in ("Hernia", "Edema", "Fracture"))
    sources, rows = data.order.locate(np.arange(64))
    assert set(sources.tolist()) == {0, 1}
    batch = data.__getitems__(list(range(64)))
    for place, (number, row) in enumerate(zip(sources, rows, strict=True)):
        target = batch["target"][place]
        index = (chexpert, other)[number]
        assert int(batch["key"][place]) & (2**64 - 1) == int(index.table("train")["key"][row])
        if number == 0:
            assert torch.isnan(target[hernia])
        else:
            assert torch.isnan(target[fracture]) and target[edema] == row % 2
            state = (1.0, 0.0, float("nan"), float("nan"))[row % 4]
            np.testing.assert_equal(float(target[hernia]), state)


def test_weights_decide_how_much_of_each_source_is_read(shards, other):
    names = ("Edema", "Effusion")
    sources = [source(load_index(shards), names=names), source(other, names=names)]
    data = dataset(sources, batch=16, weights=(0.0, 1.0))
    words = set(other.table("train")["key"].tolist())
    batch = data.__getitems__(list(range(64)))
    assert {int(key) & (2**64 - 1) for key in batch["key"]} == words
    assert batch["target"].shape == (64, 2)


def test_expected_labels_must_be_these(shards):
    index = load_index(shards)
    assert target_names([index], POLICY, "intersection", labels.CHEXPERT_FINDINGS) == labels.CHEXPERT_FINDINGS
    for wrong in (list(reversed(labels.CHEXPERT_FINDINGS)), ["cat", "dog"]):
        with pytest.raises(ValueError, match=r"data\.expect_labels .* another data set, or the label policy differs"):
            target_names([index], POLICY, "intersection", wrong)


def test_sets_that_cannot_be_trained_together(shards, other, pictures, tmp_path):
    chexpert, images = load_index(shards), load_index(pictures / "shards")
    with pytest.raises(ValueError, match="mixes multiclass and multilabel"):
        target_names([chexpert, images], POLICY, "union", None)
    with pytest.raises(ValueError, match="different salts"):
        target_names(
            [chexpert, from_records(Findings(other.folder), b"another salt, 32 bytes in length")], POLICY, "union", None
        )
    alone = Findings(other.folder, label_names=("Hernia", "Mass", "Nodule"))
    with pytest.raises(ValueError, match="no finding in common"):
        target_names([chexpert, from_records(alone, SALT)], POLICY, "intersection", None)
    birds = make_image_folder(tmp_path / "images", classes=("crow", "dog", "emu"))
    build(plan_shards(open_source("image_folder", birds), SALT), tmp_path / "shards")
    with pytest.raises(ValueError, match="other classes"):
        target_names([images, load_index(tmp_path / "shards")], POLICY, "intersection", None)


# ---- samplers


@pytest.mark.parametrize(("samples", "world", "batch"), [(11, 1, 4), (11, 2, 4), (1, 3, 2), (12, 3, 4), (13, 3, 4)])
def test_validation_covers_every_sample_and_ranks_keep_step(samples, world, batch):
    shares = [list(EvalSampler(samples, rank, world, batch)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert all(len(one) == batch for share in shares for one in share)
    flat = [position for share in shares for one in share for position in one]
    assert set(flat) == set(range(samples))
    assert all(flat.count(position) == 1 for position in range(1, samples))  # 0 fills up


def test_many_files_stay_within_the_limit_of_open_files(root, monkeypatch):
    """An index over loose files opens one file an image; only a few stay open."""
    monkeypatch.setattr(shard_reader, "_OPEN_FILES", 5)
    before = len(os.listdir("/proc/self/fd"))
    data = dataset([source(from_records(open_source("chexpert", root), SALT))])
    data.__getitems__(list(range(48)))
    assert len(os.listdir("/proc/self/fd")) - before <= 5

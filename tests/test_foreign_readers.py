"""Readers that are not ours iterate our shards: webdataset, wids, Hugging Face datasets and timm.

For a multi-label and a multi-class set, each must give every sample once, with the right pixels and
labels.  In the multi-label set nothing is known of most training images, the first ones of every shard among
them: readers infer types from the first samples, so a null there would break them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers_data import SALT, make_chexpert, make_image_folder
from PIL import Image

from scaletransfer import keys
from scaletransfer.index import load_index
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import open_source

# Read when the library is imported: nothing here may ask the network.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

UNKNOWN_FIRST = 5  # the number of samples that Hugging Face's reader infers features from


class Made(NamedTuple):
    """A folder of shards and what must be read from its training split: by key, and the keys in tar order."""

    folder: Path
    urls: list[str]
    pixels: dict[str, np.ndarray]
    labels: dict[str, Any]
    patients: dict[str, str]
    order: list[str]


def make(kind: str, base: Path) -> Made:
    if kind == "multilabel":
        known = [{}] * 36
        salted = {"rows": 36, "valid": 6, "laterals": False}
        root = make_chexpert(base / "CheXpert-v1.0", labels=known, **salted)
        # which rows come first is only known from the plan: give labels to some of the others
        plan = plan_shards(open_source("chexpert", root), SALT, shard_size=12)
        late = {s.image for start in (0, 12, 24) for s in plan.samples["train"][start + UNKNOWN_FIRST : start + 9]}
        images = [r.image for r in open_source("chexpert", root) if r.split == "train"]
        findings = {"Edema": 1, "Pleural Effusion": -1, "Fracture": 0}
        labels = [findings if image in late else {} for image in images]
        make_chexpert(base / "CheXpert-v1.0", labels=labels, **salted)
        source = open_source("chexpert", root)
    else:
        root = make_image_folder(base / "images", per_class=9)
        source = open_source("image_folder", root)
    folder = base / "shards"
    build(plan_shards(source, SALT, shard_size=12), folder)
    records = {keys.key(source.name, r.source_id, SALT): r for r in source if r.split == "train"}
    index = load_index(folder)
    return Made(
        folder=folder,
        urls=[str(index.path("train", shard)) for shard in range(len(index.splits["train"].shards))],
        pixels={key: np.asarray(Image.open(root / record.image)) for key, record in records.items()},
        labels={k: list(r.labels) if kind == "multilabel" else r.labels for k, r in records.items()},
        patients={k: keys.patient_code(source.name, r.patient, SALT) for k, r in records.items()},
        order=index.keys("train", slice(None)),
    )


@pytest.fixture(scope="module")
def multilabel(tmp_path_factory) -> Made:
    return make("multilabel", tmp_path_factory.mktemp("multilabel"))


@pytest.fixture(scope="module")
def multiclass(tmp_path_factory) -> Made:
    return make("multiclass", tmp_path_factory.mktemp("multiclass"))


def test_the_fixture_begins_with_unknown_rows(multilabel, multiclass):
    table = load_index(multilabel.folder).table("train")
    for shard in range(3):
        states = table["labels"][table["shard"] == shard]
        assert (states[:UNKNOWN_FIRST] == -2).all() and set(np.unique(states)) == {-2, -1, 0, 1}
    assert len(multilabel.order) == 36 and len(multiclass.order) == 27 and len(multiclass.urls) == 3


def test_webdataset_as_pil(multilabel, multiclass):
    import webdataset

    for made, label in ((multilabel, "json"), (multiclass, "cls")):
        dataset = webdataset.WebDataset(made.urls, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", label)
        seen = []
        for key, image, value in dataset:
            seen.append(key)
            assert np.array_equal(np.asarray(image.convert("L" if label == "json" else "RGB")), made.pixels[key])
            assert (value["labels"] if label == "json" else value) == made.labels[key]
            if label == "json":
                assert value.keys() == {"labels", "patient", "view"} and value["patient"] == made.patients[key]
        assert seen == made.order


def test_webdataset_as_torch(multilabel, multiclass):
    import webdataset

    for made, label in ((multilabel, "json"), (multiclass, "cls")):
        dataset = (
            webdataset.WebDataset(made.urls, shardshuffle=False).decode("torchrgb8").to_tuple("__key__", "jpg", label)
        )
        seen = []
        for key, image, value in dataset:
            seen.append(key)
            assert image.shape[0] == 3
            assert np.array_equal(image.numpy().transpose(1, 2, 0), _as_rgb(made, key))
            assert (value["labels"] if label == "json" else value) == made.labels[key]
        assert seen == made.order


def test_wids(multilabel, multiclass, tmp_path):
    import wids

    for made, label in ((multilabel, ".json"), (multiclass, ".cls")):
        cache = str(tmp_path / label)
        dataset = wids.ShardListDataset(str(made.folder / "wids-train.json"), cache_dir=cache)
        assert len(dataset) == len(made.order)
        for row in (0, 13, 26, 5):  # random access
            sample = dataset[row]
            key = sample["__key__"]
            assert key == made.order[row]
            assert np.array_equal(np.asarray(sample[".jpg"]), made.pixels[key])
            value = sample[label]
            assert (value["labels"] if label == ".json" else value) == made.labels[key]
        assert [dataset[row]["__key__"] for row in range(len(dataset))] == made.order
        dataset.close()


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kind", ["multilabel", "multiclass"])
def test_hugging_face_datasets(kind, streaming, request, tmp_path):
    import datasets

    made = request.getfixturevalue(kind)
    files = {"train": made.urls, "validation": str(made.folder / "valid-*.tar")}
    loaded = datasets.load_dataset(
        "webdataset", data_files=files, streaming=streaming, cache_dir=str(tmp_path / "cache")
    )
    seen = []
    for sample in loaded["train"]:
        key = sample["__key__"]
        seen.append(key)
        assert np.array_equal(np.asarray(sample["jpg"]), made.pixels[key])
        if kind == "multilabel":
            assert sample["json"]["labels"] == made.labels[key]
            assert sample["json"]["patient"] == made.patients[key] and sample["json"]["view"] in ("PA", "AP")
        else:
            assert sample["cls"] == made.labels[key]
    assert sorted(seen) == sorted(made.order)
    assert len(list(loaded["validation"])) == load_index(made.folder).splits["valid"].samples


@pytest.mark.parametrize("kind", ["multilabel", "multiclass"])
def test_timm(kind, request):
    from timm.data import create_dataset

    made = request.getfixturevalue(kind)
    # timm takes the class from `cls`, or from the JSON field that target_key names: here the raw states
    options = {"target_key": "labels"} if kind == "multilabel" else {}
    dataset = create_dataset("wds/", root=str(made.folder), split="train", is_training=False, batch_size=4, **options)
    assert len(dataset) == len(made.order)
    seen = 0
    for key, (image, target) in zip(made.order, dataset, strict=True):
        seen += 1
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), _as_rgb(made, key))
        assert target == made.labels[key]
    assert seen == len(made.order)


@pytest.mark.parametrize("kind", ["multilabel", "multiclass"])
def test_timm_in_training_gives_every_sample_once_an_epoch(kind, request):
    from timm.data import create_dataset

    made = request.getfixturevalue(kind)
    options = {"target_key": "labels"} if kind == "multilabel" else {}
    dataset = create_dataset("wds/", root=str(made.folder), split="train", is_training=True, batch_size=1, **options)
    pictures = [np.asarray(image).tobytes() for image, _ in dataset]
    assert sorted(pictures) == sorted(_as_rgb(made, key).tobytes() for key in made.order)


def test_side_files_name_every_shard_with_its_size(multilabel):
    index = load_index(multilabel.folder)
    info = json.loads((multilabel.folder / "_info.json").read_text())
    for split, expected in index.splits.items():
        wids = json.loads((multilabel.folder / f"wids-{split}.json").read_text())
        assert wids["wids_version"] == 1
        files = [(shard.file, shard.samples) for shard in expected.shards]
        assert [(shard["url"], shard["nsamples"]) for shard in wids["shardlist"]] == files
        assert [shard["filesize"] for shard in wids["shardlist"]] == [shard.bytes for shard in expected.shards]
        listed = info["splits"][split]
        assert list(zip(listed["filenames"], listed["shard_lengths"], strict=True)) == files
        assert listed["num_samples"] == expected.samples and listed["name"] == split


def _as_rgb(made: Made, key: str) -> np.ndarray:
    pixels = made.pixels[key]
    return pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)

"""`scaletransfer predict` and `features`: evaluation's own numbers, and maps that an analytic form agrees with."""

from __future__ import annotations

import builtins
import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_data import SALT, draw_image, make_chexpert, make_image_folder
from helpers_transfer import make_pretrained
from PIL import Image

from scaletransfer.cli import main as cli
from scaletransfer.evaluate import evaluate
from scaletransfer.explain import heat
from scaletransfer.features import features
from scaletransfer.labels import CHEXPERT_FINDINGS
from scaletransfer.model_images import files_target, find_files, look, open_ready, pooled
from scaletransfer.models import create_model
from scaletransfer.predict import predict
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import open_source

CLASSES = ("cat", "dog", "emu")
FINDINGS = ("Edema", "Pleural/Other", "Mass")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("images")
    return make_image_folder(base / "animals", classes=CLASSES, per_class=4, splits=("train", "test"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_pretrained(tmp_path_factory.mktemp("model") / "m", labels=CLASSES, mean=[0.4, 0.5, 0.6])


@pytest.fixture(scope="module")
def findings(tmp_path_factory) -> Path:
    folder = make_pretrained(tmp_path_factory.mktemp("xray") / "m", labels=FINDINGS, kind="xray")
    return change(folder, task="multilabel")


def change(folder: Path, **fields: Any) -> Path:
    """Set (None: remove) fields of a model.json."""
    card = json.loads((folder / "model.json").read_text()) | fields
    card = {key: value for key, value in card.items() if value is not None}
    (folder / "model.json").write_text(json.dumps(card))
    return folder


def refused(capsys, *argv: Any) -> str:
    assert cli([str(word) for word in argv]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown
    return shown.err


def test_the_table_has_the_probabilities_of_evaluate(model, images, tmp_path, capsys):
    evaluate(model, images=images, split="test", out=tmp_path / "e", workers=0, resamples=0, batch=5)
    with open(tmp_path / "e" / "predictions.csv", newline="") as stream:
        expected = {row["image"]: row for row in csv.DictReader(stream)}
    capsys.readouterr()
    assert cli(["predict", str(model), str(images / "test"), "--batch", "5", "--workers", "0"]) == 0
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(found) == len(expected) == 12
    for row in found:
        other = expected[Path(row["image"]).relative_to(images).as_posix()]
        assert row["predicted"] == other["predicted"]
        for name in CLASSES:
            assert float(row[f"p:{name}"]) == pytest.approx(float(other[f"p:{name}"]), abs=2e-6)
        assert sum(float(row[f"p:{name}"]) for name in CLASSES) == pytest.approx(1, abs=1e-5)


def test_top_and_out(model, images, tmp_path, capsys):
    one, two = images / "test/dog/img_1.jpg", images / "test/cat/img_0.jpg"
    argv = ["predict", str(model), str(one), str(two), str(one), "--top", "2", "--out", str(tmp_path / "t.csv")]
    assert cli(argv) == 0
    assert capsys.readouterr().out == f"{tmp_path / 't.csv'}: 2 images\n"
    with open(tmp_path / "t.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["image"] for row in rows] == [str(one), str(two)]  # in the order given, each once
    full = {row[0]: row for row in predict(model, [one, two])[0][1:]}
    for row in rows:
        p = dict(zip(CLASSES, map(float, full[Path(row["image"])][2:]), strict=True))
        best = sorted(p, key=lambda name: -p[name])
        assert [row["label_1"], row["label_2"]] == best[:2]
        assert float(row["p_1"]) == p[best[0]]
    assert "has 3 labels" in refused(capsys, "predict", model, one, "--top", "4")


def test_multi_label_probabilities_do_not_compete_and_odd_images_are_read(findings, tmp_path):
    for name, mode in (("grey.png", "L"), ("colour.jpg", "RGB"), ("deep.png", "I;16")):
        draw_image(tmp_path / name, 3, mode=mode)
    picture = Image.open(tmp_path / "colour.jpg")
    picture.convert("RGBA").save(tmp_path / "alpha.png")
    picture.convert("CMYK").save(tmp_path / "cmyk.tif")
    rows, _ = predict(findings, [tmp_path], workers=0)
    assert rows[0] == ["image", *(f"p:{name}" for name in FINDINGS)] and len(rows) == 6
    p = np.array([[float(cell) for cell in row[1:]] for row in rows[1:]])
    assert ((p > 0) & (p < 1)).all() and not np.allclose(p.sum(1), 1)


def test_grad_cam_is_the_class_activation_map(model, images):
    """Before a mean and a linear layer Grad-CAM is CAM (arXiv 1512.04150): weights x maps, positive part."""
    pytest.importorskip("pytorch_grad_cam")
    ready = open_ready(model, ())
    (seen,) = look(ready, files_target(find_files([images / "test/cat"])), "test", batch=8, workers=0)
    network, x = ready.network, torch.nn.functional.interpolate(seen.images, size=96)
    found = heat(network, x, [[2, 0], [0, 1], [1, 2], [1, 0]])
    assert found.shape == (4, 2, 96, 96)
    found = found[:, 0]
    assert found.shape == (4, 96, 96) and found.min() >= 0 and found.max() <= 1 + 1e-6
    with torch.no_grad():
        maps = network.head.relu(network.head.gn(network.body(network.root(x))))
        weights = network.head.conv.weight[[2, 0, 1, 1], :, 0, 0]
        cam = torch.einsum("nc,nchw->nhw", weights, maps).clamp(min=0).numpy()
    coarse = found[:, 16::32, 16::32]  # the middles of the 3 x 3 cells
    cam = (cam - cam.min((1, 2), keepdims=True)) / (cam.max((1, 2), keepdims=True) - cam.min((1, 2), keepdims=True))
    assert np.abs(coarse - cam).max() < 0.05
    assert not any(parameter.requires_grad is False for parameter in network.parameters())


def test_pictures_for_each_finding(findings, model, images, tmp_path, capsys):
    pytest.importorskip("pytorch_grad_cam")
    for number in range(2):
        draw_image(tmp_path / "in" / f"chest_{number}.png", number)
    out = tmp_path / "maps"
    assert cli(["predict", str(findings), str(tmp_path / "in"), "--explain", str(out), "--workers", "0"]) == 0
    shown = capsys.readouterr()
    assert len(list(csv.reader(io.StringIO(shown.out)))) == 3 and "6 Grad-CAM pictures" in shown.err
    names = {f"chest_{n}_{what}.png" for n in range(2) for what in ("Edema", "Pleural_Other", "Mass")}
    assert {path.name for path in out.iterdir()} == names
    with Image.open(out / "chest_0_Mass.png") as picture:
        assert picture.mode == "RGB" and picture.size == (32, 32)
        assert np.asarray(picture).std() > 5
    _, written = predict(model, [images / "test"], explain=tmp_path / "animals", workers=0)
    assert len(written) == len(set(written)) == 12  # of a multi-class model the first class, under names of their own
    _, written = predict(model, [images / "test/cat/img_0.jpg"], explain=tmp_path / "two", top=2)
    assert len(list((tmp_path / "two").iterdir())) == 2


def test_features_are_what_the_classifier_gets(model, images, tmp_path, capsys):
    assert cli(["features", str(model), str(images), "--out", str(tmp_path / "f.npz"), "--workers", "0"]) == 0
    assert "24 images of 1024 features, 3 label names" in capsys.readouterr().out
    with np.load(tmp_path / "f.npz", allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    assert found["features"].dtype == np.float32 and found["features"].shape == (24, 1024)
    assert found["split"].tolist() == ["train"] * 12 + ["test"] * 12
    assert [CLASSES[n] for n in found["label"]] == [Path(str(f)).parts[1] for f in found["image"]]
    assert len(set(found["key"])) == 24
    # through the classifier they are the logits of evaluate
    ready = open_ready(model, ())
    head = ready.network.head.conv
    logits = torch.from_numpy(found["features"]) @ head.weight[:, :, 0, 0].T + head.bias
    evaluate(model, images=images, split="test", out=tmp_path / "e", workers=0, resamples=0)
    with open(tmp_path / "e" / "predictions.csv", newline="") as stream:
        expected = {row["key"]: [float(row[f"p:{name}"]) for name in CLASSES] for row in csv.DictReader(stream)}
    p = logits.softmax(1).detach().numpy()
    for key, row in zip(found["key"][12:], p[12:], strict=True):
        np.testing.assert_allclose(row, expected[key], atol=2e-6)
    loose = features(model, images / "test/dog", workers=0)
    assert set(loose) == {"features", "key", "split", "image"}
    np.testing.assert_allclose(loose["features"], found["features"][16:20], atol=1e-5)


def test_features_of_shards_have_their_labels(tmp_path):
    root = make_chexpert(tmp_path / "chexpert", rows=8, valid=4, laterals=False)
    build(plan_shards(open_source("chexpert", root), SALT), tmp_path / "shards")
    model = change(make_pretrained(tmp_path / "m", labels=CHEXPERT_FINDINGS, kind="xray"), task="multilabel")
    found = features(model, tmp_path / "shards", workers=0)
    assert found["features"].shape == (12, 1024) and found["label"].shape == (12, 13)
    assert np.isnan(found["label"]).any() and set(np.unique(found["label"][~np.isnan(found["label"])])) == {0, 1}
    assert found["label_names"].tolist() == list(CHEXPERT_FINDINGS) and "image" not in found


def test_features_of_a_network_of_timm():
    network = create_model("resnet18", 3).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = pooled(network, x)
        assert found.shape == (2, 512) and torch.allclose(network.fc(found), network(x), atol=1e-6)


def test_what_is_missing_is_named(model, images, tmp_path, capsys, monkeypatch):
    one = images / "test/cat/img_0.jpg"
    assert "there is no image" in refused(capsys, "predict", model, tmp_path / "nothing.png")
    (tmp_path / "empty").mkdir()
    assert "holds no image" in refused(capsys, "predict", model, tmp_path / "empty")
    (tmp_path / "broken.png").write_bytes(one.read_bytes()[:200])
    assert "broken.png" in refused(capsys, "predict", model, one, tmp_path / "broken.png")
    for field, option in (("task", "--task"), ("transform", "--transform and --size")):
        other = change(make_pretrained(tmp_path / field, labels=CLASSES), **{field: None})
        assert f"import {option}" in refused(capsys, "predict", other, one)
    unnamed = change(make_pretrained(tmp_path / "unnamed", labels=CLASSES), label_names=None)
    assert predict(unnamed, [one])[0][0] == ["image", "predicted", "p:0", "p:1", "p:2"]
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pytorch_grad_cam"):
            raise ImportError("No module named 'pytorch_grad_cam'", name="pytorch_grad_cam")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    message = refused(capsys, "predict", model, one, "--explain", tmp_path / "maps")
    assert "pip install 'scaletransfer[explain]'" in message and not (tmp_path / "maps").exists()

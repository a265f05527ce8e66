"""`scaletransfer evaluate`: the same numbers as the run that made the model, as scikit-learn, and on two processes."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers_data import SALT, make_chexpert, make_image_folder
from helpers_engine import ROOT, command, environment
from helpers_transfer import config, make_pretrained
from sklearn import metrics as sklearn

from scaletransfer.evaluate import evaluate, main
from scaletransfer.finetune import finetune
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import open_source

CLASSES = ("cat", "dog", "emu")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("images")
    return make_image_folder(base / "animals", classes=CLASSES, per_class=7, splits=("train", "val", "test"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, images) -> Path:
    base = tmp_path_factory.mktemp("run")
    finetune(base / "run", config(f"data.images={images}", f"model.path={make_pretrained(base / 'pre')}"))
    return base / "run"


def read(folder: Path) -> list[dict[str, str]]:
    with open(folder / "predictions.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_numbers_of_the_run(run, images, tmp_path):
    found = evaluate(run, images=images, out=tmp_path / "out", workers=0, batch=5, resamples=20)
    result = json.loads((run / "result.json").read_text())
    for key in ("accuracy", "mean_auroc", "mean_average_precision", "loss", "samples"):
        assert found[key] == pytest.approx(result["metrics"][key], abs=1e-6), key
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["accuracy"] == found["accuracy"]
    ours, theirs = read(tmp_path / "out"), read(run)
    assert [(r["key"], r["predicted"]) for r in ours] == [(r["key"], r["predicted"]) for r in theirs]


def test_scikit_learn_agrees_from_the_predictions_alone(run, images, tmp_path):
    found = evaluate(run, images=images, split="test", out=tmp_path / "out", workers=0, resamples=0)
    table = read(tmp_path / "out")
    truth = np.array([CLASSES.index(row["label"]) for row in table])
    p = np.array([[float(row[f"p:{name}"]) for name in CLASSES] for row in table])
    guess = p.argmax(1)
    assert found["accuracy"] == sklearn.accuracy_score(truth, guess)
    assert found["mean_f1"] == pytest.approx(sklearn.f1_score(truth, guess, average="macro"), abs=1e-9)
    assert found["mean_auroc"] == pytest.approx(sklearn.roc_auc_score(np.eye(3)[truth], p, average="macro"), abs=1e-4)
    assert found["loss"] == pytest.approx(sklearn.log_loss(truth, p), abs=1e-4)
    assert "intervals" not in found


def test_a_pretrained_xray_model_on_its_shards(tmp_path):
    root = make_chexpert(tmp_path / "CheXpert-v1.0", rows=30, valid=12, seed=1)
    source = open_source("chexpert", root)
    build(plan_shards(source, SALT), tmp_path / "shards")
    from scaletransfer.labels import CHEXPERT_FINDINGS

    model = make_pretrained(tmp_path / "pre", labels=CHEXPERT_FINDINGS, kind="xray")
    card = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps({**card, "task": "multilabel"}))
    found = evaluate(model, shards=tmp_path / "shards", out=tmp_path / "out", workers=0, resamples=10)
    assert found["intervals"]["unit"] == "patient"
    table = read(tmp_path / "out")
    name = "Effusion"
    known = [row for row in table if row[f"label:{name}"] != ""]
    truth, p = [int(r[f"label:{name}"]) for r in known], [float(r[f"p:{name}"]) for r in known]
    if len(set(truth)) == 2:
        assert found["classes"][name]["auroc"] == pytest.approx(sklearn.roc_auc_score(truth, p), abs=1e-6)
    assert found["classes"][name]["positives"] == sum(truth)
    with pytest.raises(ValueError, match=r"is a multilabel model but .* is multiclass"):
        evaluate(model, images=make_image_folder(tmp_path / "animals"), workers=0)


@pytest.mark.engine
def test_two_processes_give_the_same_as_one(run, images, tmp_path):
    one = evaluate(run, images=images, split="test", out=tmp_path / "one", workers=0, batch=4, resamples=20)
    arguments = [str(run), "--images", str(images), "--split", "test", "--batch", "4", "--workers", "0"]
    words = command("ddp", 2, "scaletransfer.evaluate", *arguments, "--bootstrap", "20", "--out", str(tmp_path / "two"))
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert two["samples"] == one["samples"] == 21
    for key in ("accuracy", "mean_auroc", "mean_average_precision", "loss"):
        assert two[key] == pytest.approx(one[key], abs=1e-6)
    assert [r["key"] for r in read(tmp_path / "two")] == [r["key"] for r in read(tmp_path / "one")]


BEYOND = (
    "optimizer.name=adamw",
    "optimizer.lr=0.001",
    "ema_decay=0.7",
    "model.freeze_through=block2",
    "cutmix=1",
    "label_smoothing=0.1",
    "data.valid_ratio=0.3",
)


@pytest.mark.engine
@pytest.mark.parametrize("more", [(), pytest.param(BEYOND, marks=pytest.mark.slow)])
def test_fine_tuning_on_two_processes_is_that_of_one(images, tmp_path, more):
    pre = make_pretrained(tmp_path / "pre")
    finetune(tmp_path / "one", config(f"data.images={images}", f"model.path={pre}", *more))
    overrides = [f"data.images={images}", f"model.path={pre}", *more]
    from helpers_transfer import FAST, losses

    words = command("ddp", 2, "scaletransfer.finetune", "--logdir", str(tmp_path / "two"), *FAST, *overrides)
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    one, two = (json.loads((tmp_path / n / "result.json").read_text())["metrics"] for n in ("one", "two"))
    assert two["samples"] == one["samples"] and two["loss"] == pytest.approx(one["loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "exactly one of --images"),
        (["--images", "IMAGES", "--shards", "x"], "exactly one of --images"),
        (["--source", "chexpert"], "--source needs --root"),
        (["--images", "IMAGES", "--split", "dev"], "has no split 'dev', only train, valid, test"),
        (["--images", "IMAGES", "--batch", "0"], "--batch is 0: give 1 or more"),
        (["--images", "OTHER"], r"label names do not fit: .* has cat, dog, emu; .* has ant, bee"),
        (["--images", "ORDER"], r"label names do not fit: .* has cat, dog, emu; .* has cat, dog, fox"),
        (["--imges", "x"], "did you mean --images"),
        (["--images", "IMAGES", "--out", __file__], "is a file: give a folder"),
    ],
)
def test_refusals(run, images, tmp_path, arguments, message):
    other = make_image_folder(tmp_path / "other", classes=("ant", "bee"))
    order = make_image_folder(tmp_path / "order", classes=("cat", "dog", "fox"))
    places = {"IMAGES": str(images), "OTHER": str(other), "ORDER": str(order)}
    with pytest.raises(ValueError, match=message):
        main([str(run), *(places.get(word, word) for word in arguments)])


def test_models_that_cannot_be_evaluated(run, images, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "model.safetensors").write_bytes((run / "model" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="does not say its model"):
        evaluate(tmp_path / "bare", images=images)
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="is a run, not a model"):
        evaluate(tmp_path / "unfinished", images=images)
    (tmp_path / "bare" / "model.json").write_text((run / "model" / "model.json").read_text())
    data = bytearray((tmp_path / "bare" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "bare" / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"is not the file that model.json describes"):
        evaluate(tmp_path / "bare", images=images)

"""Scores of a set of images: against scikit-learn, and again from the predictions file alone."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers_data import SALT, make_chexpert, make_image_folder
from helpers_transfer import config, make_pretrained
from sklearn import metrics as sklearn
from sklearn.calibration import calibration_curve

from scaletransfer.calibration import calibration, confusion, reliability
from scaletransfer.evaluate import evaluate, evaluate_predictions, main
from scaletransfer.finetune import finetune
from scaletransfer.labels import CHEXPERT_FINDINGS
from scaletransfer.metrics import CHEXPERT_FIVE
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import open_source
from scaletransfer.transfer.predictions import read_predictions, write_predictions
from scaletransfer.transfer.scores import lines, summarise

CLASSES = ("cat", "dog", "emu")


def close(ours, theirs, where=""):
    """Equal structures, numbers to rounding."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            close(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            close(*pair, f"{where}[{number}]")
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, abs=1e-6), where
    else:
        assert ours == theirs, where


def drawn(rows: int = 300, labels: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    target = rng.integers(0, 2, (rows, labels)).astype(np.float64)
    logits = rng.normal(size=(rows, labels)) + target
    target[rng.random((rows, labels)) < 0.2] = np.nan
    return logits, target


def test_reliability_is_scikit_learns_curve_and_brier():
    rng = np.random.default_rng(0)
    p = rng.random(2000)
    hit = rng.random(2000) < p**1.5
    found = reliability(p, hit, bins=10)
    share, mean = calibration_curve(hit, p, n_bins=10)
    assert [row["frequency"] for row in found["bins"]] == pytest.approx(share)
    assert [row["confidence"] for row in found["bins"]] == pytest.approx(mean)
    weights = np.array([row["count"] for row in found["bins"]]) / 2000
    assert found["ece"] == pytest.approx(float((weights * np.abs(share - mean)).sum()))
    assert found["mce"] == pytest.approx(float(np.abs(share - mean).max()))
    assert found["brier"] == pytest.approx(sklearn.brier_score_loss(hit, p))
    assert reliability([1.0, 1.0], [True, True])["ece"] == 0
    assert reliability([0.8] * 5, [1, 1, 1, 1, 0])["ece"] == pytest.approx(0)
    assert reliability([], []) == {"ece": None, "mce": None, "brier": None, "bins": []}


def test_the_calibration_of_many_classes_is_that_of_the_most_probable():
    """By hand: two bins, (0.5, 0.6] with one right of two, (0.8, 0.9] with one right of one, of 15."""
    p = np.array([[0.52, 0.48, 0.0], [0.1, 0.53, 0.37], [0.05, 0.1, 0.85]])
    found = calibration(p, np.array([0, 2, 2]), CLASSES)
    assert [row["count"] for row in found["bins"]] == [2, 1]
    assert found["ece"] == pytest.approx(2 / 3 * abs(0.525 - 0.5) + 1 / 3 * 0.15)
    assert confusion(p, np.array([0, 2, 2]), CLASSES) == sklearn.confusion_matrix([0, 2, 2], [0, 1, 2]).tolist()


def test_confusion_of_labels_and_specificity_are_scikit_learns():
    logits, target = drawn()
    names = [f"f{i}" for i in range(7)]
    found = summarise(logits, target, names, "multilabel", resamples=0)
    for column, name in enumerate(names):
        rows = ~np.isnan(target[:, column])
        truth, said = target[rows, column], logits[rows, column] > 0
        assert found["confusion"][name] == sklearn.confusion_matrix(truth, said).tolist()
        assert found["classes"][name]["specificity"] == pytest.approx(sklearn.recall_score(truth, said, pos_label=0))
        p = 1 / (1 + np.exp(-logits[rows, column]))
        assert found["calibration"]["classes"][name]["brier"] == pytest.approx(sklearn.brier_score_loss(truth, p))
    p, known = 1 / (1 + np.exp(-logits)), ~np.isnan(target)
    assert found["loss"] == pytest.approx(sklearn.log_loss(target[known], p[known]))


def test_five_findings_and_each_source_of_a_merged_set():
    logits, target = drawn()
    names = [*CHEXPERT_FIVE, "Pneumonia", "Pneumothorax"]
    sources = ["chexpert"] * 100 + ["nih"] * 200
    found = summarise(logits, target, names, "multilabel", sources=sources, resamples=30)
    expected = np.mean([found["classes"][name]["auroc"] for name in CHEXPERT_FIVE])
    assert (
        found["chexpert_five"]["mean_auroc"] == pytest.approx(expected) and found["chexpert_five"]["mean_classes"] == 5
    )
    low, high = found["chexpert_five"]["interval"]
    assert low < expected < high
    alone = summarise(logits[100:], target[100:], names, "multilabel", resamples=30)
    assert found["sources"]["nih"] == alone and found["sources"]["chexpert"]["samples"] == 100
    shown = lines(found, names)
    assert "5 of CheXpert's 5" in shown and "nih: 200 images" in shown and "calibration error" in shown
    assert "chexpert_five" not in summarise(logits, target, list("abcdefg"), "multilabel", resamples=0)


def test_validation_of_a_merged_set_has_a_row_for_each_source():
    from scaletransfer.engine.evaluate import by_source, curves, report, titles_of
    from scaletransfer.losses import make_loss

    logits, target = drawn()
    predicted = {"logits": logits.astype(np.float32), "target": target.astype(np.float32), "position": np.arange(300)}
    names, loss = [*CHEXPERT_FIVE, "Pneumonia", "Mass"], make_loss("multilabel")
    which, titles = (np.arange(300) >= 120).astype(np.int64), titles_of(["chexpert", "nih"])
    found = by_source(loss, predicted, names, which, titles)
    alone = report(loss, {key: values[which == 1] for key, values in predicted.items()}, names)
    assert list(found) == ["chexpert", "nih"] and found["chexpert"]["samples"] == 120
    assert found["nih"]["mean_auroc"] == alone["mean_auroc"] and found["nih"]["loss"] == alone["loss"]
    assert found["nih"]["chexpert_five"] == alone["chexpert_five"]
    tags = curves({**report(loss, predicted, names), "sources": found}, names)
    assert tags["test/nih/mean_auc"] == alone["mean_auroc"] and "test/mean_auc_chexpert_five" in tags
    assert by_source(loss, predicted, names, which, ["nih"]) == {}
    assert titles_of(["nih", "mimic", "nih"]) == ["nih 1", "mimic", "nih 2"]


def test_a_class_without_positives_takes_no_part_and_warns_nobody():
    logits, target = drawn(60, 3)
    target[:, 1] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = summarise(logits, target, CLASSES, "multilabel", resamples=20)
    one = found["classes"]["dog"]
    assert one["auroc"] is one["f1"] is one["recall"] is None and one["specificity"] is not None
    assert found["mean_classes"] == 2 and found["intervals"]["classes"]["dog"]["auroc"] is None
    assert "-" in lines(found, CLASSES)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("run")
    images = make_image_folder(base / "animals", classes=CLASSES, per_class=7)
    finetune(base / "run", config(f"data.images={images}", f"model.path={make_pretrained(base / 'pre')}"))
    return base / "run", images


def test_all_scores_come_again_from_the_predictions_alone(run, tmp_path, capsys):
    folder, images = run
    found = evaluate(folder, images=images, workers=0, resamples=50, out=tmp_path / "a")
    assert (
        main(
            [
                "--predictions",
                str(tmp_path / "a" / "predictions.csv"),
                "--bootstrap",
                "50",
                "--out",
                str(tmp_path / "b"),
            ]
        )
        == 0
    )
    again = json.loads((tmp_path / "b" / "metrics.json").read_text())
    close(again, json.loads((tmp_path / "a" / "metrics.json").read_text()))
    close(again, json.loads(json.dumps(found)))
    shown = capsys.readouterr().out
    assert "21 images, 3 classes" in shown
    result = json.loads((folder / "result.json").read_text())["metrics"]
    assert result["confusion"] == again["confusion"] and result["calibration"]["ece"] == pytest.approx(
        again["calibration"]["ece"]
    )


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half(run, tmp_path):
    """Writing past the limit fails with EFBIG, as it does with ENOSPC on a full disk."""
    import resource
    import signal

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"predictions\.csv cannot be written .*: make room there") as caught:
            parts = [({"position": np.arange(3), "target": np.zeros(3, np.int64), "logits": LOGITS}, *opened(run[1]))]
            write_predictions(tmp_path / "predictions.csv", "multiclass", parts * 300, CLASSES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


LOGITS = np.random.default_rng(0).normal(size=(3, 3))


def opened(images: Path):
    from scaletransfer import keys
    from scaletransfer.index import from_records

    return from_records(open_source("image_folder", images), keys.PUBLIC_SALT), "valid"


def chexpert_model(base: Path, labels) -> Path:
    model = make_pretrained(base, labels=labels, kind="xray")
    card = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps({**card, "task": "multilabel"}))
    return model


def test_labels_patients_and_merged_sets_from_the_file(tmp_path):
    folders = []
    for seed in (1, 2):
        root = make_chexpert(tmp_path / f"{seed}" / "CheXpert-v1.0", rows=20, valid=14, seed=seed)
        build(plan_shards(open_source("chexpert", root), SALT), tmp_path / f"shards{seed}")
        folders.append(tmp_path / f"shards{seed}")
    model = chexpert_model(tmp_path / "pre", CHEXPERT_FINDINGS)
    one = evaluate(model, shards=folders[0], out=tmp_path / "one", workers=0, resamples=20)
    again = evaluate_predictions(tmp_path / "one" / "predictions.csv", resamples=20)
    close(json.loads(json.dumps(again)), json.loads(json.dumps(one)))
    assert one["intervals"]["unit"] == "patient" == again["intervals"]["unit"]
    assert one["chexpert_five"]["mean_classes"] >= 1
    both = evaluate(model, shards=folders, out=tmp_path / "both", workers=0, resamples=20)
    assert both["samples"] == sum(part["samples"] for part in both["sources"].values()) and set(both["sources"]) == {
        "chexpert 1",
        "chexpert 2",
    }
    close(json.loads(json.dumps(both["sources"]["chexpert 1"])), json.loads(json.dumps(one)))
    read = read_predictions(tmp_path / "both" / "predictions.csv")
    assert len(read.keys) == both["samples"] and both["intervals"]["units"] == len(set(read.groups.tolist()))
    some = chexpert_model(tmp_path / "five", CHEXPERT_FIVE)
    found = evaluate(some, shards=folders[0], workers=0, resamples=0)
    assert list(found["classes"]) == list(CHEXPERT_FIVE)
    assert found["classes"]["Edema"]["positives"] == one["classes"]["Edema"]["positives"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [r[:-1] for r in rows], None),
        (lambda rows: [[c.replace("p:", "x:") for c in rows[0]], *rows[1:]], r"lacks the column p:<class>"),
        (lambda rows: [["k", *rows[0][1:]], *rows[1:]], "lacks the column key"),
        (lambda rows: rows[:1], "has no row"),
        (lambda rows: [rows[0], [*rows[1][:-1], "1.5"]], r"row 1, p:emu: '1.5' is no number of 0 to 1"),
        (lambda rows: [rows[0], [*rows[1][:-1], "nan"]], "is no number of 0 to 1"),
        (lambda rows: [rows[0], [*rows[1][:2], "fox", *rows[1][3:]]], "'fox' is none of the classes"),
    ],
)
def test_a_file_that_holds_no_predictions(run, tmp_path, change, message):
    with (run[0] / "predictions.csv").open(newline="") as handle:
        rows = list(csv.reader(handle))
    with (tmp_path / "p.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows(change(rows))
    if message is None:
        message = "'emu' is none of the classes"
    with pytest.raises(ValueError, match=message):
        evaluate_predictions(tmp_path / "p.csv")
    with pytest.raises(ValueError, match="cannot be read"):
        evaluate_predictions(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="leave MODEL and the data out"):
        main([str(run[0]), "--predictions", str(tmp_path / "p.csv")])
    with pytest.raises(ValueError, match="which model"):
        main([])

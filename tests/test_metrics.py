"""Reports against scikit-learn in hand-made loops, and small tables counted by hand."""

from __future__ import annotations

import json
import time
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from scaletransfer import metrics
from scaletransfer.metrics import PER_CLASS, multiclass_report, multilabel_report, ranking

NAMES = ("Atelectasis", "Edema", "Effusion", "Absent", "Always", "Unknown")


def _multilabel() -> tuple[np.ndarray, np.ndarray]:
    """Ties (rounded scores), 40 % unknown, and classes without positives, negatives and known labels."""
    rng = np.random.default_rng(0)
    target = rng.integers(0, 2, (300, 6)).astype(np.float64)
    scores = np.round(rng.normal(size=(300, 6)) + target - 0.6, 1)
    target[:, 3], target[:, 4] = 0, 1
    target[rng.random((300, 6)) < 0.4] = np.nan
    target[:, 5] = np.nan
    return scores, target


def _reference(truth: np.ndarray, score: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    return {
        "auroc": sk.roc_auc_score(truth, score),
        "average_precision": sk.average_precision_score(truth, score),
        "precision": sk.precision_score(truth, predicted, zero_division=0),
        "recall": sk.recall_score(truth, predicted),
        "f1": sk.f1_score(truth, predicted),
        "accuracy": sk.accuracy_score(truth, predicted),
    }


@pytest.mark.parametrize("from_logits", [True, False])
def test_multilabel_equals_scikit_learn_class_by_class(from_logits: bool) -> None:
    logits, target = _multilabel()
    probability = 1 / (1 + np.exp(-logits))
    report = multilabel_report(logits if from_logits else probability, target, NAMES, from_logits=from_logits)
    collected: dict[str, list[float]] = {metric: [] for metric in PER_CLASS}
    right = known = 0
    for column, name in enumerate(NAMES):
        rows = [i for i in range(300) if not np.isnan(target[i, column])]
        truth, p = target[rows, column].astype(int), probability[rows, column]
        predicted = (p > 0.5).astype(int)
        right, known = right + int((predicted == truth).sum()), known + len(rows)
        got = report["classes"][name]
        assert (got["positives"], got["negatives"]) == (int(truth.sum()), len(rows) - int(truth.sum()))
        if len(set(truth)) < 2:
            assert all(got[metric] is None for metric in PER_CLASS), name
            continue
        for metric, value in _reference(truth, p, predicted).items():
            assert abs(got[metric] - value) < 1e-9, (name, metric)
        for metric in PER_CLASS:
            collected[metric].append(got[metric])
    assert report["mean_classes"] == 3
    for metric, values in collected.items():
        assert len(values) == 3 and abs(report[f"mean_{metric}"] - sum(values) / 3) < 1e-12
    assert report["known"] == known and report["samples"] == 300
    assert abs(report["accuracy"] - right / known) < 1e-12
    assert report["classes"]["Absent"]["accuracy"] is not None
    assert report["classes"]["Unknown"] == dict.fromkeys([*PER_CLASS, "accuracy"]) | {
        "positives": 0,
        "negatives": 0,
    }


def test_multilabel_counted_by_hand() -> None:
    nan = float("nan")
    scores = [[3.0, -1.0], [1.0, -2.0], [1.0, -3.0], [-1.0, -4.0], [9.0, 9.0]]
    target = [[1, 1], [1, 0], [0, 0], [0, 1], [nan, nan]]
    report = multilabel_report(scores, target, ["a", "b"])
    a, b = report["classes"]["a"], report["classes"]["b"]
    # a: of four pairs three are in order and one is a tie; precision 1/1 at recall 1/2, 2/3 at recall 1.
    assert a["auroc"] == 3.5 / 4
    assert abs(a["average_precision"] - (0.5 * 1 + 0.5 * 2 / 3)) < 1e-15
    assert (a["precision"], a["recall"]) == (2 / 3, 1.0) and abs(a["f1"] - 0.8) < 1e-15
    # b: nothing is predicted.
    assert (b["auroc"], b["precision"], b["recall"], b["f1"]) == (0.5, 0.0, 0.0, 0.0)
    assert b["average_precision"] == 0.5 * 1 + 0.5 * 2 / 4
    assert (report["accuracy"], report["known"]) == (5 / 8, 8)
    assert report["mean_auroc"] == (3.5 / 4 + 0.5) / 2


def test_logits_that_lie_in_0_1_are_still_logits() -> None:
    report = multilabel_report([[0.4], [0.2], [0.1]], [[1], [1], [0]], ["a"])
    assert report["classes"]["a"]["recall"] == 1.0
    report = multilabel_report([[0.4], [0.2], [0.1]], [[1], [1], [0]], ["a"], from_logits=False)
    assert report["classes"]["a"]["recall"] == 0.0


def test_large_logits_are_ranked_without_saturation() -> None:
    report = multilabel_report([[60.0], [50.0], [40.0]], [[1], [0], [0]], ["a"])
    assert report["classes"]["a"]["auroc"] == 1.0


def test_an_unknown_label_may_have_any_score() -> None:
    scores, target = [[np.inf, 1.0], [1.0, np.nan], [0.0, -1.0]], [[np.nan, 1], [1, np.nan], [0, 0]]
    assert multilabel_report(scores, target, ["a", "b"])["mean_auroc"] == 1.0


@pytest.mark.parametrize("from_logits", [True, False])
def test_multiclass_equals_scikit_learn_class_by_class(from_logits: bool) -> None:
    rng = np.random.default_rng(1)
    target = rng.integers(0, 7, 250)
    target[target == 4] = 5  # class 4 never comes
    logits = np.round(rng.normal(size=(250, 8)) + 1.5 * np.eye(8)[target], 1)
    logits[:, 6] -= 100  # class 6 is never predicted
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    probability = shifted / shifted.sum(1, keepdims=True)
    names = [f"class {i}" for i in range(8)]
    report = multiclass_report(logits if from_logits else probability, target, names, from_logits=from_logits)
    predicted = probability.argmax(1)
    means: dict[str, list[float]] = {metric: [] for metric in PER_CLASS}
    for index, name in enumerate(names):
        got, truth = report["classes"][name], (target == index).astype(int)
        if index in (4, 7):
            assert all(got[metric] is None for metric in PER_CLASS) and got["positives"] == 0
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference = _reference(truth, probability[:, index], (predicted == index).astype(int))
        for metric, value in reference.items():
            assert abs(got[metric] - value) < 1e-9, (name, metric)
        for metric in PER_CLASS:
            means[metric].append(reference[metric])
    assert report["classes"]["class 6"]["precision"] == 0.0
    assert report["mean_classes"] == 6
    for metric, values in means.items():
        assert abs(report[f"mean_{metric}"] - np.mean(values)) < 1e-9
    assert abs(report["accuracy"] - sk.accuracy_score(target, predicted)) < 1e-12
    tops = [sorted(range(8), key=lambda c: (-logits[i, c], c))[:5] for i in range(250)]
    assert report["accuracy_top5"] == np.mean([target[i] in tops[i] for i in range(250)])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-4, 4)), min_size=2, max_size=40))
def test_ranking_equals_scikit_learn_with_ties(rows: list[tuple[bool, int]]) -> None:
    truth, score = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], dtype=np.float64)
    if len(set(truth.tolist())) < 2:
        return
    auroc, precision = ranking(np.sort(score[truth]), np.sort(score))
    assert abs(auroc - sk.roc_auc_score(truth, score)) < 1e-9
    assert abs(precision - sk.average_precision_score(truth, score)) < 1e-9


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16])
def test_multiclass_in_blocks_equals_one_block(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    scores, target = rng.normal(size=(37, 11)).astype(kind), rng.integers(0, 11, 37)
    names = [str(i) for i in range(11)]
    whole = multiclass_report(scores, target, names)
    assert whole == multiclass_report(scores.astype(np.float64), target, names)
    for block in (1, 37 * 3, 100):
        monkeypatch.setattr(metrics, "BLOCK", block)
        assert multiclass_report(scores, target, names) == whole


def test_many_classes_cost_seconds_and_no_second_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 classes: two calls of scikit-learn for each take about 20 s; the table alone is 32 MB in float64."""
    monkeypatch.setattr(metrics, "BLOCK", 1 << 16)
    rng = np.random.default_rng(10)
    scores, target = rng.standard_normal((2000, 2000), dtype=np.float32), rng.integers(0, 2000, 2000)
    names = [str(i) for i in range(2000)]
    tracemalloc.start()
    start = time.process_time()
    report = multiclass_report(scores, target, names)
    spent, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert spent < 6 and peak < 12e6
    assert report["mean_classes"] == len(set(target.tolist()))


def test_multiclass_top5_against_scikit_learn_without_ties() -> None:
    rng = np.random.default_rng(2)
    scores, target = rng.normal(size=(200, 9)), rng.integers(0, 9, 200)
    report = multiclass_report(scores, target, [str(i) for i in range(9)])
    assert abs(report["accuracy_top5"] - sk.top_k_accuracy_score(target, scores, k=5)) < 1e-12


def test_multiclass_ties_go_to_the_lower_index() -> None:
    report = multiclass_report(np.zeros((2, 6)), [0, 5], list("abcdef"))
    assert (report["accuracy"], report["accuracy_top5"]) == (0.5, 0.5)
    assert multiclass_report(np.zeros((2, 4)), [0, 3], list("abcd"))["accuracy_top5"] is None


def test_empty_and_all_unknown_sets_are_null() -> None:
    for target in (np.zeros((0, 2)), np.full((3, 2), np.nan)):
        report = multilabel_report(np.zeros(target.shape), target, ["a", "b"])
        assert report["accuracy"] is None and report["mean_auroc"] is None and report["mean_classes"] == 0
        json.dumps(report, allow_nan=False)
    empty = multiclass_report(np.zeros((0, 2)), np.zeros(0, dtype=int), ["a", "b"])
    assert empty["accuracy"] is None and empty["mean_f1"] is None


def test_reports_are_plain_json() -> None:
    scores, target = _multilabel()
    for report in (
        multilabel_report(scores.astype(np.float32), target.astype(np.float32), NAMES),
        multiclass_report(scores, np.arange(300, dtype=np.int32) % 6, NAMES),
    ):
        assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_refusals() -> None:
    with pytest.raises(ValueError, match="do not fit together"):
        multilabel_report(np.zeros((3, 2)), np.zeros((3, 2)), ["a"])
    with pytest.raises(ValueError, match="do not fit together"):
        multiclass_report(np.zeros((3, 2)), np.zeros(4, dtype=int), ["a", "b"])
    with pytest.raises(ValueError, match="must be 0, 1 or NaN"):
        multilabel_report(np.zeros((1, 1)), [[-1]], ["a"])
    with pytest.raises(ValueError, match="1 scores are NaN or infinite"):
        multilabel_report([[np.nan, 1.0]], [[1, 0]], ["a", "b"])
    with pytest.raises(ValueError, match="integers from 0 to 1"):
        multiclass_report(np.zeros((1, 2)), [2], ["a", "b"])
    with pytest.raises(ValueError, match="integers from 0 to 1"):
        multiclass_report(np.zeros((1, 2)), [0.5], ["a", "b"])
    with pytest.raises(ValueError, match="two dimensions"):
        multilabel_report(np.zeros(3), np.zeros(3), ["a"])
    with pytest.raises(ValueError, match="'a' comes more than once"):
        multilabel_report(np.zeros((1, 2)), np.zeros((1, 2)), ["a", "a"])

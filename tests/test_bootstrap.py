"""Intervals against resamples that are really built, against scikit-learn's weights, and against known truths."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from scaletransfer import bootstrap
from scaletransfer.bootstrap import intervals
from scaletransfer.metrics import PER_CLASS, multiclass_report, multilabel_report

NAMES = ("Atelectasis", "Edema", "Rare", "Absent", "Always", "Unknown")
MEANS = tuple(f"mean_{metric}" for metric in PER_CLASS)


def multilabel(rows: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ties, unknown labels, a class with one positive, three without both outcomes; patients of 1 to 4 images."""
    rng = np.random.default_rng(3)
    target = rng.integers(0, 2, (rows, 6)).astype(np.float64)
    scores = np.round(rng.normal(size=(rows, 6)) + target - 0.5, 1)
    target[:, 2], target[7, 2] = 0, 1
    target[:, 3], target[:, 4] = 0, 1
    target[rng.random((rows, 6)) < 0.3] = np.nan
    target[7, 2], target[:, 5] = 1, np.nan
    groups = np.sort(rng.integers(0, rows // 2, rows)) * 1000
    groups[rng.random(rows) < 0.2] = -1
    return scores, target, groups


def resamples(groups: np.ndarray, samples: int, seed: int) -> list[np.ndarray]:
    """The rows of each resample, drawn unit by unit: known patients in the order of their codes, then the others."""
    units = [np.flatnonzero(groups == code) for code in np.unique(groups[groups >= 0])]
    units += [np.array([row]) for row in np.flatnonzero(groups < 0)]
    generator = np.random.Generator(np.random.Philox(seed))
    return [np.concatenate([units[i] for i in generator.integers(len(units), size=len(units))]) for _ in range(samples)]


def percentiles(values: list[float | None]) -> list[float] | None:
    there = [value for value in values if value is not None]
    return [float(end) for end in np.quantile(there, [(1 - 0.9) / 2, (1 + 0.9) / 2])] if there else None


def check(found: dict[str, Any], reports: list[dict[str, Any]]) -> None:
    """Intervals that equal those of full reports of every resample; counts exactly, averages to rounding."""
    for key in ("accuracy", "accuracy_top5"):
        if key in found:
            assert found[key] == percentiles([report[key] for report in reports])
    for mean in MEANS:
        np.testing.assert_allclose(found[mean], percentiles([report[mean] for report in reports]), rtol=1e-13)
    for name, both in found["classes"].items():
        assert both["auroc"] == percentiles([report["classes"][name]["auroc"] for report in reports]), name
        for key in PER_CLASS[1:]:
            expected = percentiles([report["classes"][name][key] for report in reports])
            if expected is None:
                assert both[key] is None
            else:
                np.testing.assert_allclose(both[key], expected, rtol=1e-13)


@pytest.mark.parametrize("chunk", [bootstrap.CHUNK, 40 * 7, 1])
@pytest.mark.parametrize("by_patient", [True, False])
def test_multilabel_equals_reports_of_the_resampled_images(by_patient: bool, chunk: int, monkeypatch) -> None:
    monkeypatch.setattr(bootstrap, "CHUNK", chunk)
    scores, target, groups = multilabel()
    found = intervals(
        scores, target, NAMES, task="multilabel", groups=groups if by_patient else None, samples=60, seed=5, level=0.9
    )
    rows = resamples(groups if by_patient else np.full(40, -1), 60, 5)
    reports = [multilabel_report(scores[r], target[r], NAMES) for r in rows]
    assert len({report["mean_classes"] for report in reports}) > 1  # the rare class is in some resamples only
    check(found, reports)
    for name in ("Absent", "Always", "Unknown"):
        assert found["classes"][name] == dict.fromkeys(PER_CLASS)
    assert found["classes"]["Rare"]["auroc"] is not None
    units = len(set(groups[groups >= 0])) + int((groups < 0).sum()) if by_patient else 40
    assert (found["unit"], found["units"]) == ("patient" if by_patient else "image", units)
    assert (found["samples"], found["level"]) == (60, 0.9)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize("from_logits", [True, False])
def test_multiclass_equals_reports_of_the_resampled_images(from_logits: bool) -> None:
    rng = np.random.default_rng(4)
    target = rng.integers(0, 5, 50)
    target[target == 3] = 2  # class 3 never comes
    scores = np.round(rng.normal(size=(50, 5)) + np.eye(5)[target], 1)
    if not from_logits:
        scores = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    groups, names = rng.integers(0, 20, 50), list("abcde")
    found = intervals(
        scores,
        target,
        names,
        task="multiclass",
        groups=groups,
        samples=60,
        seed=1,
        level=0.9,
        from_logits=from_logits,
    )
    check(
        found,
        [multiclass_report(scores[r], target[r], names, from_logits=from_logits) for r in resamples(groups, 60, 1)],
    )
    assert found["classes"]["d"] == dict.fromkeys(PER_CLASS)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(2, 30))
def test_weighted_ranks_equal_scikit_learn(data: st.DataObject, rows: int) -> None:
    score = np.array(data.draw(st.lists(st.integers(-3, 3), min_size=rows, max_size=rows)), dtype=np.float64)
    positive = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    known = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    weights = np.array(data.draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows)), dtype=np.int32)
    auroc, precision = bootstrap._Class.of(score, positive, np.flatnonzero(known)).rank(weights[None])
    drawn = known & (weights > 0)
    if len(set(positive[drawn])) < 2:
        assert np.isnan(auroc).all() and np.isnan(precision).all()
        return
    arguments = positive[drawn], score[drawn]
    assert abs(auroc[0] - roc_auc_score(*arguments, sample_weight=weights[drawn])) < 1e-9
    assert abs(precision[0] - average_precision_score(*arguments, sample_weight=weights[drawn])) < 1e-9


def test_the_seed_alone_decides() -> None:
    scores, target, groups = multilabel()
    arguments: dict[str, Any] = {"task": "multilabel", "groups": groups, "samples": 100}
    one = intervals(scores, target, NAMES, seed=1, **arguments)
    assert one == intervals(scores.copy(), target, NAMES, seed=1, **arguments)
    assert one["mean_auroc"] != intervals(scores, target, NAMES, seed=2, **arguments)["mean_auroc"]
    wide = intervals(scores, target, NAMES, seed=1, level=0.99, **arguments)
    for mean in MEANS:
        assert wide[mean][0] <= one[mean][0] < one[mean][1] <= wide[mean][1]


def test_an_interval_covers_the_true_accuracy_as_often_as_it_says() -> None:
    """Patients of four images that are all right or all wrong: only intervals by patient cover the truth."""
    rng = np.random.default_rng(6)
    covered = {"patient": 0, "image": 0}
    for trial in range(150):
        right = np.repeat(rng.random(60) < 0.7, 4)
        target = rng.integers(0, 2, 240)
        scores = np.eye(2)[np.where(right, target, 1 - target)]
        for unit, groups in (("patient", np.repeat(np.arange(60), 4)), ("image", None)):
            found = intervals(
                scores, target, ["a", "b"], task="multiclass", groups=groups, samples=200, seed=trial, class_limit=0
            )
            assert found["unit"] == unit
            covered[unit] += found["accuracy"][0] <= 0.7 <= found["accuracy"][1]
    assert 0.88 <= covered["patient"] / 150 <= 0.99
    assert covered["image"] / 150 < 0.8


def test_an_interval_covers_the_true_auroc() -> None:
    """Two normal distributions one standard deviation apart: the AUROC is Phi(1 / sqrt 2) = 0.76025."""
    rng, covered = np.random.default_rng(7), 0
    for trial in range(100):
        target = (np.arange(150) < 50).astype(np.float64)[:, None]
        scores = rng.normal(size=(150, 1)) + target
        low, high = intervals(scores, target, ["a"], task="multilabel", samples=200, seed=trial)["mean_auroc"]
        covered += low <= 0.76025 <= high
    assert 86 <= covered <= 99


def test_many_classes_have_an_accuracy_only() -> None:
    rng = np.random.default_rng(8)
    target, scores = rng.integers(0, 300, 400), rng.normal(size=(400, 300))
    names = [str(i) for i in range(300)]
    found = intervals(scores, target, names, task="multiclass", samples=20)
    assert found["accuracy"] is not None and found["classes"] == {}
    assert found["mean_auroc"] is None and found["mean_average_precision"] is None
    found = intervals(scores, target, names, task="multiclass", samples=20, class_limit=300)
    assert len(found["classes"]) == 300 and found["mean_auroc"] is not None


def test_nothing_to_draw_from_is_null() -> None:
    for rows in (0, 1):
        found = intervals(np.zeros((rows, 2)), np.zeros((rows, 2)), ["a", "b"], task="multilabel", samples=5)
        assert found["units"] == rows and [found[mean] for mean in MEANS] == [None] * len(MEANS)
        found = intervals(np.zeros((rows, 2)), np.zeros(rows, dtype=int), ["a", "b"], task="multiclass", samples=5)
        assert [found[mean] for mean in MEANS] == [None] * len(MEANS)
    one_patient = intervals([[0.0], [1.0]], [[0], [1]], ["a"], task="multilabel", groups=[4, 4], samples=5)
    assert (one_patient["units"], one_patient["unit"], one_patient["accuracy"]) == (1, "patient", None)
    unknown = intervals(np.zeros((3, 1)), np.full((3, 1), np.nan), ["a"], task="multilabel", samples=5)
    assert unknown["accuracy"] is None and unknown["classes"]["a"]["auroc"] is None


def test_patients_that_are_all_unknown_are_images() -> None:
    scores, target, _ = multilabel()
    with_codes = intervals(scores, target, NAMES, task="multilabel", groups=np.full(40, -1), samples=20)
    assert with_codes == intervals(scores, target, NAMES, task="multilabel", samples=20)
    assert with_codes["unit"] == "image"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": np.zeros(3, dtype=int)}, r"40 integers, -1 for no known patient, not shape \(3,\)"),
        ({"groups": np.zeros(40)}, "of float64"),
        ({"groups": np.full(40, -2)}, "-1 for no known patient"),
        ({"samples": 0}, "samples >= 1"),
        ({"level": 1.0}, "0 < level < 1"),
        ({"task": "regression"}, "multilabel or multiclass, not 'regression'"),
        ({"names": NAMES[1:]}, "do not fit together"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    scores, target, groups = multilabel()
    arguments: dict[str, Any] = {"names": NAMES, "task": "multilabel", "groups": groups, "samples": 5} | change
    with pytest.raises(ValueError, match=message):
        intervals(scores, target, **arguments)

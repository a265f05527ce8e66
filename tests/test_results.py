"""What results are read, refused and averaged to, against scipy's own tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers_report import write_run, write_runs
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from scaletransfer.results import Estimate, collect, metric_words, shot_words, summarise

VALUES = st.floats(0, 100)


def test_collect_finds_results_at_any_depth_once(tmp_path: Path) -> None:
    base = write_runs(tmp_path / "a" / "b", {"scratch": [0.5, 0.6], "zero2": [0.7]})
    found = collect([tmp_path, base, base / "xray5-5-zero2-0", base / "xray5-5-zero2-0" / "result.json"])
    assert [result.folder.name for result in found] == ["xray5-5-scratch-0", "xray5-5-scratch-1", "xray5-5-zero2-0"]
    last = found[-1]
    assert (last.pretrained_model, last.seed, last.shot, last.percent) == ("zero2", 0, 5, 70.0)
    assert last.metrics["loss"] == 1.5 and last.label_names == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a result of scaletransfer finetune"),
        ('{"format": "coco"}', "is not a result of scaletransfer finetune"),
        ('{"format": "scaletransfer-result", "format_version": 2}', "format_version 2, this release reads 1"),
    ],
)
def test_collect_refuses_what_is_no_result(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        collect([tmp_path])
    assert str(tmp_path / "result.json") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "3"}, "field 'seed' is missing or of a wrong type"),
        ({"seed": True}, "field 'seed' is missing or of a wrong type"),
        ({"shot": 1.5}, "field 'shot' is missing or of a wrong type"),
        ({"label_names": "a"}, "field 'label_names' is missing or of a wrong type"),
        ({"metric": "mean_f1"}, "no value for its metric 'mean_f1'"),
        ({"metrics": {"accuracy": None}}, "no value for its metric 'accuracy'"),
        ({"metrics": {"accuracy": float("nan")}}, "no value for its metric 'accuracy'"),
    ],
)
def test_collect_refuses_fields(tmp_path: Path, changes: dict, message: str) -> None:
    write_run(tmp_path / "run", 0.5, **changes)
    with pytest.raises(ValueError, match=message):
        collect([tmp_path])


def test_collect_refuses_a_missing_field_and_empty_folders(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", 0.5) / "result.json"
    content = json.loads(path.read_text())
    del content["protocol"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="field 'protocol' is missing"):
        collect([tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no result\.json: give folders of fine-tuning runs"):
        collect([tmp_path / "empty"])
    with pytest.raises(ValueError, match="nowhere does not exist"):
        collect([tmp_path / "nowhere"])


def test_collect_refuses_the_same_seed_twice(tmp_path: Path) -> None:
    write_run(tmp_path / "one", 0.5, seed=3)
    write_run(tmp_path / "two", 0.6, seed=3)
    with pytest.raises(ValueError, match="both scratch on xray5 with 5 images per class and seed 3") as caught:
        collect([tmp_path])
    assert str(tmp_path / "one") in str(caught.value) and str(tmp_path / "two") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 1000}, "xray5, 5 images per class: steps 500 and 1000"),
        ({"last_step": 400}, "last_step 500 and 400"),
        ({"protocol": "paper"}, "protocol bit and paper"),
        ({"label_names": ["b", "a"]}, r"\(xray5: label_names differ\)"),
        ({"valid_samples": 399}, "valid_samples 400 and 399"),
        ({"metric": "mean_auroc"}, "metric accuracy and mean_auroc"),
        ({"task": "multilabel"}, "task multiclass and multilabel"),
    ],
)
def test_summarise_refuses_what_cannot_be_compared(tmp_path: Path, changes: dict, message: str) -> None:
    write_run(tmp_path / "a", 0.5)
    write_run(tmp_path / "b", 0.5, pretrained_model="zero2", **changes)
    results = collect([tmp_path])
    with pytest.raises(ValueError, match=message) as caught:
        summarise(results)
    assert "leave one of them out" in str(caught.value)


def test_seeds_of_one_model_share_the_learning_rate_and_models_need_not(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.5)
    write_run(tmp_path / "b", 0.5, pretrained_model="zero2", peak_lr=0.01)
    assert len(summarise(collect([tmp_path])).cells) == 1
    write_run(tmp_path / "c", 0.5, pretrained_model="zero2", seed=1)
    with pytest.raises(ValueError, match=r"peak_lr 0\.01 and 0\.001"):
        summarise(collect([tmp_path]))


def test_cells_may_differ_in_steps_and_stand_in_order(tmp_path: Path) -> None:
    for shot, steps in ((None, 10_000), (10, 500), (2, 500)):
        write_runs(tmp_path, {"zero2": [0.5], "scratch": [0.4]}, shot=shot, steps=steps, last_step=steps)
    write_runs(tmp_path, {"scratch": [0.4]}, dataset="cifar10", metric="mean_auroc")
    summary = summarise(collect([tmp_path]))
    assert [(c.dataset, c.shot) for c in summary.cells] == [
        ("cifar10", 5),
        ("xray5", 2),
        ("xray5", 10),
        ("xray5", None),
    ]
    assert summary.models == ("scratch", "zero2") and [r.model for r in summary.cells[1].rows] == ["scratch", "zero2"]
    assert list(summary.by_dataset()) == ["cifar10", "xray5"]


@given(st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=8))
def test_intervals_equal_those_of_scipy(pairs: list[tuple[float, float]]) -> None:
    a, b = np.array(pairs).T
    one = Estimate.of(dict(enumerate(a.tolist())))
    paired = Estimate.of(dict(enumerate((b - a).tolist())))
    assert one.interval is not None and paired.interval is not None
    if a.std() > 1e-9:
        low, high = stats.t.interval(0.95, len(a) - 1, loc=a.mean(), scale=stats.sem(a))
        np.testing.assert_allclose(one.interval, (low, high), rtol=1e-9, atol=1e-9)
    if (b - a).std() > 1e-9:
        expected = stats.ttest_rel(b, a).confidence_interval(0.95)
        np.testing.assert_allclose(paired.interval, (expected.low, expected.high), rtol=1e-9, atol=1e-9)
        assert paired.excludes_zero == (stats.ttest_rel(b, a).pvalue < 0.05)


def test_gains_are_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    for seed, score in {0: 0.1, 1: 0.2, 2: 0.4}.items():
        write_run(tmp_path / f"s{seed}", score, seed=seed)
    for seed, score in {1: 0.5, 2: 0.6, 7: 0.99}.items():
        write_run(tmp_path / f"z{seed}", score, seed=seed, pretrained_model="zero2")
    write_run(tmp_path / "other", 0.3, seed=9, pretrained_model="other")
    (cell,) = summarise(collect([tmp_path])).cells
    base, other, row = cell.rows
    assert (base.model, other.model, row.model) == ("scratch", "other", "zero2")
    assert row.gain is not None and row.gain.seeds == (1, 2) and row.score.seeds == (1, 2, 7)
    assert row.gain.mean == pytest.approx((30 + 20) / 2)
    assert base.gain is None and other.gain is None
    assert other.score.interval is None and not other.score.excludes_zero


def test_the_baseline_must_be_there(tmp_path: Path) -> None:
    write_runs(tmp_path, {"imagenet1k": [0.5], "zero2": [0.6]})
    results = collect([tmp_path])
    with pytest.raises(ValueError, match=r"'imagenet' \(did you mean imagenet1k\?\): there are imagenet1k, zero2"):
        summarise(results, "imagenet")
    assert summarise(results, "zero2").models == ("zero2", "imagenet1k")
    assert all(row.gain is None for row in summarise(results, None).cells[0].rows)


def test_words() -> None:
    assert [shot_words(s) for s in (1, 5, None)] == ["1 image per class", "5 images per class", "all training images"]
    assert [metric_words(m) for m in ("accuracy", "mean_auroc")] == ["accuracy (%)", "mean AUROC (%)"]

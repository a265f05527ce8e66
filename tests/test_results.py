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

from scaletransfer.results import Estimate, check_comparable, collect, shot_words

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
def test_what_was_not_made_alike_is_not_compared(tmp_path: Path, changes: dict, message: str) -> None:
    write_run(tmp_path / "a", 0.5)
    write_run(tmp_path / "b", 0.5, pretrained_model="zero2", **changes)
    results = collect([tmp_path])
    with pytest.raises(ValueError, match=message) as caught:
        check_comparable(results)
    assert "leave one of them out" in str(caught.value)


def test_seeds_of_one_model_share_the_learning_rate_and_models_need_not(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.5)
    write_run(tmp_path / "b", 0.5, pretrained_model="zero2", peak_lr=0.01)
    check_comparable(collect([tmp_path]))
    write_run(tmp_path / "c", 0.5, pretrained_model="zero2", seed=1)
    with pytest.raises(ValueError, match=r"peak_lr 0\.01 and 0\.001"):
        check_comparable(collect([tmp_path]))


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


def test_a_single_seed_has_its_bootstrap_interval_and_more_have_the_scatter_of_the_seeds() -> None:
    one = Estimate.of({3: 50.0}, (41.0, 60.0))
    assert (one.interval, one.kind, one.std, one.least) == ((41.0, 60.0), "bootstrap", None, 50.0)
    assert (Estimate.of({3: 50.0}).interval, Estimate.of({3: 50.0}).kind) == (None, "")
    two = Estimate.of({0: 50.0, 1: 52.0}, (41.0, 60.0))
    assert two.kind == "seeds" and two.std == pytest.approx(2**0.5) and (two.least, two.most) == (50.0, 52.0)


def test_the_network_is_that_of_the_model_beside_the_result(tmp_path: Path) -> None:
    (write_run(tmp_path / "a", 0.5) / "model").mkdir()
    (tmp_path / "a" / "model" / "model.json").write_text('{"model": "BiT-S-R50x1"}')
    (write_run(tmp_path / "b", 0.5) / "model").mkdir()
    (tmp_path / "b" / "model" / "model.json").write_text('{"model": "BiT-S-R152x4"}')
    assert [result.network for result in collect([tmp_path])] == ["BiT-S-R50x1", "BiT-S-R152x4"]  # not one run twice
    (tmp_path / "b" / "model" / "model.json").write_text("{")
    with pytest.raises(ValueError, match=r"model\.json is not JSON"):
        collect([tmp_path])


def test_words() -> None:
    assert [shot_words(s) for s in (1, 5, None)] == ["1 image per class", "5 images per class", "all training images"]

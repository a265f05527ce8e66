"""Cells, their best, and gains over a baseline, counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_report import write_run, write_runs, write_table

from scaletransfer.report_inputs import read_inputs
from scaletransfer.summary import Cell, Row, Summary, summarise


def main_of(summary: Summary) -> list[Cell]:
    return [cell for cell in summary.cells if cell.main]


def names(cell: Cell) -> list[str]:
    return [row.entry.pretraining for row in cell.rows]


def best(cell: Cell) -> list[Row]:
    return [row for row in cell.rows if row.best]


def test_cells_stand_in_order_from_few_to_all_images(tmp_path: Path) -> None:
    for shot, steps in ((None, 10_000), (10, 500), (2, 500)):
        write_runs(tmp_path, {"zero2": [0.5], "scratch": [0.4]}, shot=shot, steps=steps, last_step=steps)
    write_runs(tmp_path, {"scratch": [0.4]}, dataset="cifar10", metric="mean_auroc")
    summary = summarise(read_inputs([tmp_path]).entries)
    found = [(cell.dataset, cell.metric, cell.shot) for cell in main_of(summary)]
    assert found == [
        ("cifar10", "mean_auroc", 5),
        ("xray5", "accuracy", 2),
        ("xray5", "accuracy", 10),
        ("xray5", "accuracy", None),
    ]
    assert [cell.metric for cell in summary.cells[:2]] == ["mean_auroc", "accuracy"]  # the main one first
    assert summary.models == (("scratch", "", ""), ("zero2", "", ""))
    assert names(main_of(summary)[1]) == ["scratch", "zero2"]
    assert list(summary.by_dataset()) == ["cifar10", "xray5"]


def test_gains_are_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    for seed, score in {0: 0.1, 1: 0.2, 2: 0.4}.items():
        write_run(tmp_path / f"s{seed}", score, seed=seed)
    for seed, score in {1: 0.5, 2: 0.6, 7: 0.99}.items():
        write_run(tmp_path / f"z{seed}", score, seed=seed, pretrained_model="zero2")
    write_run(tmp_path / "other", 0.3, seed=9, pretrained_model="other")
    (cell,) = main_of(summarise(read_inputs([tmp_path]).entries))
    base, other, row = cell.rows
    assert names(cell) == ["scratch", "other", "zero2"]
    assert row.gain is not None and row.gain.seeds == (1, 2) and row.score.seeds == (1, 2, 7)
    assert row.gain.mean == pytest.approx((30 + 20) / 2)
    assert base.gain is None and other.gain is None
    assert other.score.interval is None and not other.score.excludes_zero


def test_the_baseline_is_that_of_the_same_network(tmp_path: Path) -> None:
    rows = [
        (value + 0.01 * seed, "test/acc", seed, "5_shot", model, "d")
        for model, value in {
            "scratch_bit50x1": 0.2,
            "scratch_bit152x4": 0.3,
            "a_bit50x1": 0.5,
            "a_bit152x4": 0.7,
        }.items()
        for seed in range(2)
    ]
    table = write_table(tmp_path / "t.csv", rows)
    (cell,) = summarise(read_inputs([table]).entries).cells
    gains = {(row.entry.pretraining, row.entry.network): row.gain.mean for row in cell.rows if row.gain}
    assert gains == pytest.approx({("a", "bit50x1"): 30, ("a", "bit152x4"): 40})
    (cell,) = summarise(read_inputs([table]).entries, "a_bit50x1").cells  # one model for all
    gains = {(row.entry.pretraining, row.entry.network): row.gain.mean for row in cell.rows if row.gain}
    assert gains == pytest.approx({("a", "bit152x4"): 20, ("scratch", "bit50x1"): -30, ("scratch", "bit152x4"): -20})
    plain = write_table(
        tmp_path / "u.csv", [(v, m, s, h, n.replace("scratch_bit50x1", "scratch"), d) for v, m, s, h, n, d in rows]
    )
    (cell,) = summarise(read_inputs([plain]).entries).cells
    assert {row.entry.network for row in cell.rows if row.gain} == {"bit152x4"}  # scratch does not say which network


def test_the_baseline_must_be_there(tmp_path: Path) -> None:
    write_runs(tmp_path, {"imagenet1k": [0.5], "zero2": [0.6]})
    entries = read_inputs([tmp_path]).entries
    with pytest.raises(ValueError, match=r"'imagenet' \(did you mean imagenet1k\?\): there are imagenet1k, zero2"):
        summarise(entries, "imagenet")
    assert summarise(entries, "zero2").models[0][0] == "zero2"
    assert all(row.gain is None for row in summarise(entries, None).cells[0].rows)


def cell_of(folder: Path, values: dict[str, tuple[float, ...]], metric: str = "test/acc") -> Cell:
    rows = [(v, metric, seed, "5_shot", model, "d") for model, vs in values.items() for seed, v in enumerate(vs)]
    (cell,) = summarise(read_inputs([write_table(folder / "t.csv", rows)]).entries, None).cells
    return cell


def test_the_best_is_marked_only_where_intervals_are_apart(tmp_path: Path) -> None:
    # t(1) = 12.706: a: 0.70 -+ 0.0635 (half: 12.706 * 0.00707 / sqrt 2)
    apart = {"a": (0.695, 0.705), "b": (0.49, 0.50), "c": (0.10, 0.11)}
    assert [row.entry.pretraining for row in best(cell_of(tmp_path, apart))] == ["a"]
    assert not best(cell_of(tmp_path, apart | {"c": (0.62, 0.63)}))  # up to 68.85, from 63.65: they overlap
    assert not best(cell_of(tmp_path, apart | {"c": (0.10,)}))  # one seed: nothing is known of its scatter
    assert not best(cell_of(tmp_path, {"a": (0.695, 0.705)}))  # nothing to be better than
    loss = {"a": (0.195, 0.205), "b": (0.49, 0.50)}
    assert [row.entry.pretraining for row in best(cell_of(tmp_path, loss, "test/loss"))] == ["a"]


def test_bootstrap_intervals_decide_where_there_is_one_seed(tmp_path: Path) -> None:
    for name, score, low, high in (("a", 0.9, 0.85, 0.95), ("b", 0.7, 0.6, 0.84)):
        metrics = {"accuracy": score, "intervals": {"accuracy": [low, high]}}
        write_run(tmp_path / name, score, pretrained_model=name, metrics=metrics)
    (cell,) = summarise(read_inputs([tmp_path]).entries, None).cells
    assert [row.entry.pretraining for row in best(cell)] == ["a"] and cell.rows[0].score.kind == "bootstrap"


def test_the_best_of_the_paper_is_that_of_its_own_rows(tmp_path: Path) -> None:
    rows = [(0.99, "test/acc", s, "full_shot", "mine_bit50x1", "tuberculosis_full") for s in range(2)]
    rows += [(0.5, "test/acc", s, "full_shot", "imagenet1k_bit50x1", "tuberculosis_full") for s in range(2)]
    inputs = read_inputs([write_table(tmp_path / "t.csv", rows)], "paper")
    cells = summarise(inputs.entries, None).cells
    (cell,) = (c for c in cells if (c.dataset, c.metric, c.shot) == ("tuberculosis_full", "accuracy", None))
    assert [row.title for row in best(cell)] == ["R50x1, mine", "R152x4, CheXpert + MIMIC + NIH + PadChest (paper)"]


def test_one_mean_twice_is_refused() -> None:
    entries = read_inputs(["paper"]).entries
    with pytest.raises(ValueError, match=r"line 6 and .*line 6 are of the same runs"):
        summarise([entries[0], *entries], None)

"""The command: a table counted by hand, the published columns, one sentence where something is wrong."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import pytest
from helpers_report import write_run, write_runs

from scaletransfer.cli import run_command
from scaletransfer.report import collect, draw, main, summarise, table

# t(2) at 97.5 % is 4.302653. scratch: 50, s = 10, half 4.302653 * 10 / sqrt 3 = 24.8414. zero2: 62, s = sqrt 124 =
# 11.1355, half 27.6622. Differences 12, 10, 14: 12, s = 2, half 4.9683. late: 50.5, s = 6.3640, t(1) = 12.70620, half
# 57.1779; its one pair is with seed 0.
BY_HAND = """\
xray5, 5 images per class: accuracy (%); 400 validation images, 500 steps, protocol bit
  model    seeds   mean  95 % interval    gain over scratch  95 % interval      pairs
  scratch      3  50.00  25.16 to 74.84            baseline
  late         2  50.50  -6.68 to 107.68              +6.00  none (one seed)        1
  zero2        3  62.00  34.34 to 89.66              +12.00  +7.03 to +16.97 *      3

xray5, all training images: accuracy (%); 400 validation images, 500 steps, protocol bit
  model    seeds   mean  95 % interval    gain over scratch  95 % interval    pairs
  scratch      1  70.00  none (one seed)           baseline
  zero2        1  80.00  none (one seed)             +10.00  none (one seed)      1

Intervals: Student's t over seeds; one seed has none. Gains: percentage points over scratch, paired by seed; * \
excludes zero (each by itself).
"""


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    base = write_runs(tmp_path / "runs", {"scratch": [0.4, 0.5, 0.6], "zero2": [0.52, 0.6, 0.74]})
    write_run(base / "late-0", 0.46, pretrained_model="late", seed=0)
    write_run(base / "late-8", 0.55, pretrained_model="late", seed=8)
    return write_runs(base, {"scratch": [0.7], "zero2": [0.8]}, shot=None)


def test_the_table_counted_by_hand(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table(summarise(collect([runs]))) == BY_HAND
    assert main([str(runs)]) == 0
    shown = capsys.readouterr()
    assert shown.out == BY_HAND and shown.err == ""


def test_without_a_baseline_there_are_no_gains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_runs(tmp_path, {"imagenet1k": [0.5, 0.7], "zero2": [0.6]})
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "gain" not in out.lower() and "baseline" not in out
    assert main([str(tmp_path), "--baseline", "imagenet1k"]) == 0
    assert "gain over imagenet1k" in capsys.readouterr().out


def test_the_csv_has_the_published_columns(runs: Path, tmp_path: Path) -> None:
    write_runs(runs, {"zero2": [0.91]}, dataset="padchest", metrics={"accuracy": None, "mean_auroc": 0.91})
    (runs / "padchest-5-zero2-0" / "result.json").write_text(
        (runs / "padchest-5-zero2-0" / "result.json").read_text().replace('"accuracy", "label', '"mean_auroc", "label')
    )
    path = tmp_path / "new" / "results.csv"
    assert main([str(runs), "--csv", str(path)]) == 0
    assert path.read_text().splitlines()[0] == (
        "metric_value,metric,path,seed,shot,pretrained_model,dataset,last_step"  # the first line of theirs
    )
    with path.open() as file:
        rows = list(csv.DictReader(file))
    zero2 = [r for r in rows if r["path"] == str(runs / "xray5-5-zero2-2")]
    assert [(r["metric"], float(r["metric_value"])) for r in zero2] == [("test_acc", 74.0), ("test_mean_auc", 50.0)]
    assert {(r["seed"], r["shot"], r["pretrained_model"], r["dataset"], r["last_step"]) for r in zero2} == {
        ("2", "5_shot", "zero2", "xray5", "500")
    }
    assert {r["shot"] for r in rows} == {"5_shot", "full_shot"}
    (padchest,) = [r for r in rows if r["dataset"] == "padchest"]
    assert (padchest["metric"], padchest["metric_value"]) == ("test_mean_auc", "91.0")
    assert len(rows) == 2 * 10 + 1


def test_unfinished_runs_are_named(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "going-on").mkdir()
    (runs / "going-on" / "selection.json").write_text("{}")
    (runs / "pre-training").mkdir()
    (runs / "pre-training" / "metrics.jsonl").write_text("")
    assert main([str(runs)]) == 0
    shown = capsys.readouterr()
    assert shown.out == BY_HAND
    assert shown.err == f"left out, as they have no result.json yet: {runs / 'going-on'}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["EMPTY"], "holds no result.json"),
        (["RUNS", "--baseline", "scrach"], "did you mean scratch?"),
        (["RUNS", "--out", "x.tiff2"], "tiff2"),
        (["RUNS", "--csw", "x"], "there is no option --csw, did you mean --csv?"),
        ([], "the following arguments are required"),
    ],
)
def test_errors_are_one_sentence(
    runs: Path, tmp_path: Path, arguments: list[str], message: str, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    runs.rename(tmp_path / "RUNS")
    assert run_command(main, arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and message in shown.err and shown.err.startswith("error: ") and shown.err.count("\n") == 1


def test_a_figure_without_matplotlib_names_the_extra(runs: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'scaletransfer\[report\]'"):
        draw(summarise(collect([runs])), tmp_path / "report.png")
    assert main([str(runs)]) == 0
    assert not (tmp_path / "report.png").exists()


def test_the_module_is_a_command(runs: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["report", str(runs)])
    monkeypatch.delitem(sys.modules, "scaletransfer.report")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("scaletransfer.report", run_name="__main__")
    assert caught.value.code == 0 and capsys.readouterr().out == BY_HAND

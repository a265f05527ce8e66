"""The command: a table counted by hand, the paper's own numbers, every file, one sentence for what is wrong."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import pytest
from helpers_report import write_run, write_runs, write_table

from scaletransfer.cli import run_command
from scaletransfer.report import main
from scaletransfer.result_table import PACKAGED

# t(2) at 97.5 % is 4.302653. scratch: 50, s = 10, half 4.302653 * 10 / sqrt 3 = 24.8414. zero2: 62, s = sqrt 124 =
# 11.1355, half 27.6622. Differences 12, 10, 14: 12, s = 2, half 4.9683. late: 50.5, s = 6.3640, t(1) = 12.70620, half
# 57.1779; its one pair is with seed 0.
BY_HAND = """\
xray5, 5 images per class: accuracy (%)
  model    seeds   mean  95 % interval    gain over scratch  95 % interval      pairs
  scratch      3  50.00  25.16 to 74.84            baseline
  late         2  50.50  -6.68 to 107.68              +6.00  none (one seed)        1
  zero2        3  62.00  34.34 to 89.66              +12.00  +7.03 to +16.97 *      3

xray5, all training images: accuracy (%)
  model    seeds   mean  95 % interval     gain over scratch  95 % interval    pairs
  scratch      1  70.00  64.00 to 75.00 †           baseline
  zero2        1  80.00  none (one seed)              +10.00  none (one seed)      1

Intervals: 95 %, Student's t over seeds.
†: one seed; its 95 % interval is the bootstrap of that run's validation set.
Without an interval: one seed, of which nothing more is known.
Gains: percentage points over scratch, paired by seed; * excludes zero (each by itself).
"""

# The full-shot table of arXiv 2106.00116, of what is largest in it: pre-training, target, R50x1, R152x4.
PAPER = [
    ("CheXpert + MIMIC + NIH + PadChest", "Tuberculosis, accuracy (%)", "81.65", "90.91"),
    ("CheXpert + MIMIC + NIH + PadChest", "COVIDx, accuracy (%)", "76.05", "83.00"),
    ("CheXpert + MIMIC + NIH", "Tuberculosis, accuracy (%)", "81.32", "87.93"),
    ("ImageNet-21k", "PadChest, mean AUROC (%)", "82.03", "84.02"),
    ("ImageNet-21k", "Tuberculosis, accuracy (%)", "83.47", "80.83"),
    ("ImageNet-21k", "CIFAR-10, accuracy (%)", "95.78", "97.82"),
    ("ImageNet-21k", "CIFAR-100, accuracy (%)", "82.47", "88.54"),
    ("ImageNet-1k", "Pets, accuracy (%)", "85.21", "93.32"),
    ("ImageNet-21k", "Flowers-102 (oversampled), accuracy (%)", "98.21", "99.49"),
]
# where the best interval lies clear of all others: 4-set R152x4 89.88 to 91.94, the next 87.02 to 88.85 (Tuberculosis);
# but 81.56 to 84.44 and 80.73 to 82.57 (COVIDx), and 92.95 to 93.70 and 93.03 to 93.38 (Pets)
PAPER_BEST = {"Tuberculosis", "PadChest", "CIFAR-10", "CIFAR-100", "Flowers-102 (oversampled)"}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    base = write_runs(tmp_path / "runs", {"scratch": [0.4, 0.5, 0.6], "zero2": [0.52, 0.6, 0.74]})
    write_run(base / "late-0", 0.46, pretrained_model="late", seed=0)
    write_run(base / "late-8", 0.55, pretrained_model="late", seed=8)
    known = {"accuracy": 0.7, "intervals": {"accuracy": [0.64, 0.75]}}
    write_run(base / "xray5-None-scratch-0", 0.7, shot=None, metrics=known)
    return write_runs(base, {"zero2": [0.8]}, shot=None)


def test_the_table_counted_by_hand(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs)]) == 0
    shown = capsys.readouterr()
    assert shown.out == BY_HAND and shown.err == ""


def test_without_a_baseline_there_are_no_gains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_runs(tmp_path, {"imagenet1k": [0.5, 0.7], "zero2": [0.6]})
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "gain" not in out.lower() and "baseline" not in out
    assert main([str(tmp_path), "--baseline", "imagenet1k"]) == 0
    assert "gain over ImageNet-1k" in capsys.readouterr().out


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on the paper's own table, without figures, which have tests of their own."""
    out = tmp_path_factory.mktemp("paper")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scaletransfer.report_figure.write_figures", lambda *_: [])
        assert main(["paper", "--out", str(out)]) == 0
    return out


def test_the_published_full_shot_table_comes_out(paper: Path) -> None:
    with (paper / "tables" / "full_shot.csv").open() as file:
        rows = {(row["pre-training"], row["network"]): row for row in csv.DictReader(file)}
    markdown = (paper / "tables" / "tables.md").read_text()
    page = (paper / "index.html").read_text()
    for pretraining, target, small, large in PAPER:
        for network, number in (("R50x1", small), ("R152x4", large)):
            assert f"{float(rows[pretraining, network][target]):.2f}" == number, (pretraining, target, network)
            assert f"{number} ± " in markdown and f"{number} ± " in page
    best = {target.partition(",")[0] for row in rows.values() for target in row if "best" in target and row[target]}
    assert best == PAPER_BEST
    assert "**90.91 ± 1.03**" in markdown and "| 83.00 ± 1.44 |" in markdown and "| 93.32 ± 0.37 |" in markdown
    latex = (paper / "tables" / "full_shot.tex").read_text()
    assert r"\textbf{90.91 $\pm$ 1.03}" in latex and r"& 83.00 $\pm$ 1.44 &" in latex
    assert latex.count(r"\\") == 1 + 15 and r"\toprule" in latex


def test_every_published_mean_is_in_the_summary_which_is_read_again(paper: Path, tmp_path: Path, capsys) -> None:
    def means(path: Path) -> dict[tuple[str, ...], tuple[str, float, float]]:
        with path.open() as file:
            rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
        keys = ("dataset", "metric", "model", "pretraining", "shot")
        return {
            tuple(row[k] for k in keys): (row["primary"], float(row["mean"]), float(row["std_ddof1"])) for row in rows
        }

    ours, theirs = means(paper / "summary.csv"), means(PACKAGED)
    assert len(ours) == 578 and ours.keys() == theirs.keys()
    for key, (primary, mean, std) in ours.items():
        assert (primary, mean, std) == (theirs[key][0], pytest.approx(theirs[key][1]), pytest.approx(theirs[key][2]))
    capsys.readouterr()
    assert main([str(paper / "summary.csv")]) == 0
    again = capsys.readouterr().out
    assert main(["paper"]) == 0
    assert capsys.readouterr().out == again


def test_beside_the_paper(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("scaletransfer.report_figure.write_figures", lambda *_: [])
    rows = [
        (0.80 + 0.001 * s, "test/acc", s, "full_shot", "imagenet21k_bit152x4", "tuberculosis_full") for s in range(3)
    ]
    rows += [(0.95 + 0.001 * s, "test/acc", s, "full_shot", "chexpert_bit50x1", "tuberculosis_full") for s in range(3)]
    rows += [(0.5, "test/acc", 0, "full_shot", "chexpert_bit50x1", "mine")]
    table = write_table(tmp_path / "t.csv", rows)
    assert main([str(table), "--compare", "paper", "--out", str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "tables" / "comparison.csv").open() as file:
        found = [(r["model"], r["here"], r["paper"], r["difference"], r["intervals"]) for r in csv.DictReader(file)]
    # 80.1 -+ 0.25 lies within 80.83 -+ 3.11; 95.1 -+ 0.25 lies far from 79.83 -+ 0.56
    assert found == [
        ("R50x1, CheXpert", "95.1000", "79.8347", "+15.27", "apart"),
        ("R152x4, ImageNet-21k", "80.1000", "80.8264", "-0.73", "overlap"),
    ]
    summary = (tmp_path / "out" / "summary.csv").read_text()
    assert summary.count(",paper\n") == 150 and "cifar" not in summary  # of the paper, the targets that are here
    assert capsys.readouterr().err == ""
    assert main([str(write_table(tmp_path / "u.csv", rows[-1:])), "--compare", "paper"]) == 0
    assert "no target here is in paper as well, whose targets are called cifar10," in capsys.readouterr().err


def test_a_folder_gets_page_tables_figures_and_rows(runs: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "report"
    assert main([str(runs), "--out", str(out)]) == 0
    assert capsys.readouterr().out == BY_HAND + f"5 means in {out}: open index.html; tables/, figures/, summary.csv\n"
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    tables = {f"tables/{name}.{end}" for name in ("full_shot", "xray5", "xray5_mean_auroc") for end in ("csv", "tex")}
    figures = {f"figures/{name}.{end}" for name in ("bars", "few_shot", "gains") for end in ("png", "pdf")}
    assert names == {"index.html", "summary.csv", "results.csv", "tables/tables.md"} | tables | figures
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "metric_value",
        "metric",
        "path",
        "seed",
        "shot",
        "pretrained_model",
        "dataset",
        "last_step",
    ]
    zero2 = {r["metric"]: float(r["metric_value"]) for r in rows if r["path"] == str(runs / "xray5-5-zero2-2")}
    assert zero2 == {"test/acc": 0.74, "test/mean_auc": 0.5}
    assert main([str(out / "results.csv")]) == 0  # the rows that were written, with the run folders that they name
    assert capsys.readouterr().out == BY_HAND


def test_a_full_disk_is_said(tmp_path: Path, small_disk: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["paper", "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {tmp_path / 'out'}: a file grew beyond") and shown.count("\n") == 1


def test_without_matplotlib_there_is_all_but_the_figures(runs: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([str(runs), "--out", str(tmp_path / "out")]) == 0
    assert "note: no figures/: figures need the extra: pip install 'scaletransfer[report]'" in capsys.readouterr().err
    assert (tmp_path / "out" / "index.html").exists()


def test_a_name_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_table(tmp_path / "t.csv", [(0.5, "test/acc", 0, "5_shot", "a\x1b[2Jb", "d\x07")]))]) == 0
    out = capsys.readouterr().out
    assert out.startswith("d?, 5 images per class") and "a?[2Jb" in out and "\x1b" not in out


def test_unfinished_runs_are_named(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "going-on").mkdir()
    (runs / "going-on" / "selection.json").write_text("{}")
    (runs / "failed").mkdir()
    (runs / "failed" / "failure.json").write_text("{}")
    (runs / "pre-training").mkdir()
    (runs / "pre-training" / "metrics.jsonl").write_text("")
    assert main([str(runs)]) == 0
    shown = capsys.readouterr()
    assert shown.out == BY_HAND
    assert shown.err == f"left out, as they have no result.json (yet): {runs / 'failed'}, {runs / 'going-on'}\n"


def test_another_report_leaves_nothing_of_the_one_before(runs: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("scaletransfer.report_figure.write_figures", lambda *_: [])
    out = tmp_path / "out"
    (out / "tables").mkdir(parents=True)
    (out / "tables" / "mine.csv").write_text("kept as long as no report of ours stands there")
    assert main([str(runs), "--out", str(out)]) == 0
    assert (out / "tables" / "mine.csv").exists() and (out / "tables" / "xray5.csv").exists()
    (out / "mine.txt").write_text("kept")
    assert main(["paper", "--out", str(out)]) == 0
    assert not (out / "tables" / "xray5.csv").exists() and not (out / "results.csv").exists()
    assert (out / "tables" / "pets.csv").exists() and (out / "mine.txt").exists()


def test_a_report_never_overwrites_what_it_reads(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(runs / "results.csv", [(0.5, "test/acc", 0, "5_shot", "other", "xray5")])
    before = table.read_bytes()
    assert run_command(main, [str(runs), "--out", str(runs)]) == 2
    assert f"--out {runs} would overwrite {table}, which this report is of" in capsys.readouterr().err
    assert table.read_bytes() == before and not (runs / "index.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["EMPTY"], "holds no result.json"),
        (["NOWHERE"], "NOWHERE does not exist: give a table of results (.csv), run folders, or a sweep's folder"),
        (["RUNS", "--baseline", "scrach"], "did you mean scratch?"),
        (["RUNS", "--compare", "papper"], "papper does not exist"),
        (["RUNS", "--out", "digits.png"], "digits.png is a file's name; name a folder"),
        (["RUNS", "--csv", "x"], "there is no option --csv"),
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


def test_the_module_is_a_command(runs: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["report", str(runs)])
    monkeypatch.delitem(sys.modules, "scaletransfer.report")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("scaletransfer.report", run_name="__main__")
    assert caught.value.code == 0 and capsys.readouterr().out == BY_HAND

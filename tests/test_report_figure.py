"""The figure: what its lines and labels say, and that the file which is written is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers_report import write_run, write_runs
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from PIL import Image

from scaletransfer.report import collect, draw, main, summarise
from scaletransfer.report_figure import COLOURS, curve_cell, figure, read_curve, style
from scaletransfer.results import Cell, Row, Summary


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two models of three seeds with 1, 5 and all images, and a third with 1 and 5."""
    base = tmp_path / "runs"
    for place, shot in enumerate((1, 5, None)):
        for model, start in {"scratch": 0.3, "zero2": 0.5}.items():
            for seed in range(3):
                final = start + 0.1 * place + 0.01 * seed
                curve = {0: 0.2, 100: final - 0.1, 200: final}
                write_run(
                    base / f"{shot}-{model}-{seed}", final, curve=curve, shot=shot, pretrained_model=model, seed=seed
                )
        if shot is not None:
            write_run(base / f"{shot}-third", 0.45, curve={0: 0.2, 200: 0.45}, shot=shot, pretrained_model="third")
    return base


def heights(bars: ErrorbarContainer) -> np.ndarray:
    """The means that were drawn."""
    return np.asarray(bars.lines[0].get_ydata(), dtype=np.float64)


def panels(drawn: Figure) -> list[Axes]:
    return [axes for axes in drawn.axes if axes.get_xlabel()]


def test_curves_scores_and_gains_are_drawn_as_measured(runs: Path) -> None:
    drawn = figure(summarise(collect([runs])))
    curve, score, gain = panels(drawn)
    # the largest number of images that all three models have is 5
    assert curve.get_title() == "xray5: 5 images per class (no band: one seed)"
    assert (curve.get_xlabel(), curve.get_ylabel()) == ("Fine-tuning step", "Validation accuracy (%)")
    lines = {line.get_label(): line for line in curve.lines}
    assert set(lines) == {"scratch", "third", "zero2"}
    np.testing.assert_allclose(lines["zero2"].get_xydata(), [[0, 20], [100, 51], [200, 61]])
    np.testing.assert_allclose(lines["third"].get_xydata(), [[0, 20], [200, 45]])
    assert len(curve.collections) == 2  # bands of the two models with more than one seed
    band = curve.collections[1].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((20, 62))

    assert (score.get_xlabel(), score.get_ylabel()) == ("Training images per class", "Validation accuracy (%)")
    assert [tick.get_text() for tick in score.get_xticklabels()] == ["1", "5", "all"]
    assert [bars.get_label() for bars in score.containers] == ["scratch", "third", "zero2"]
    np.testing.assert_allclose(heights(score.containers[2]), [51, 61, 71])
    half = 4.302653 / 3**0.5  # s = 1 point
    (bar,) = score.containers[2].lines[2]
    np.testing.assert_allclose(bar.get_segments()[0][:, 1], [51 - half, 51 + half], rtol=1e-5)
    (no_bar,) = score.containers[1].lines[2]
    assert sum(np.asarray(segment).size for segment in no_bar.get_segments()) == 0
    assert score.get_title().endswith("(no bar: one seed)")

    assert gain.get_ylabel() == "Gain over scratch\n(percentage points)"
    assert [bars.get_label() for bars in gain.containers] == ["third", "zero2"]
    np.testing.assert_allclose(heights(gain.containers[1]), [20, 20, 20])
    np.testing.assert_allclose(heights(gain.containers[0]), [15, 5])
    legend = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert legend == ["scratch (baseline)", "third", "zero2"]


def test_models_stand_beside_one_another_and_near_their_tick(runs: Path) -> None:
    _, score, gain = panels(figure(summarise(collect([runs]))))
    for axes in (score, gain):
        places = [np.asarray(bars.lines[0].get_xdata(), dtype=np.float64) for bars in axes.containers]
        assert len({place[0] for place in places}) == len(places)
        for place in places:
            assert np.abs(place - place.round()).max() < 0.2


def test_the_file_is_a_picture_of_the_promised_size(runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.png"
    assert main([str(runs), "--out", str(path)]) == 0
    with Image.open(path) as picture:
        assert picture.size == (1600, 900)
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    for colour in (*COLOURS[:2], "#444444"):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - wanted).sum(axis=2) < 12).sum() > 200, colour
    assert (pixels == 255).all(axis=2).mean() > 0.5


def test_one_shot_and_one_seed_without_baseline(tmp_path: Path) -> None:
    write_runs(tmp_path, {"imagenet1k": [0.5], "zero2": [0.6]}, curve={0: 0.1, 100: 0.5})
    curve, score = panels(figure(summarise(collect([tmp_path]), None)))
    assert curve.get_title().endswith("(no band: one seed)") and not curve.collections
    assert score.get_title().endswith("(no bar: one seed)")
    assert [tick.get_text() for tick in score.get_xticklabels()] == ["5"] and score.get_xlim() == (-0.5, 0.5)


def test_data_sets_stand_in_rows_of_their_own(tmp_path: Path) -> None:
    for dataset in ("covidx", "pets", "tuberculosis"):
        metric = "accuracy" if dataset == "pets" else "mean_auroc"
        write_runs(tmp_path, {"scratch": [0.5, 0.6], "zero2": [0.6, 0.8]}, dataset=dataset, metric=metric)
    drawn = figure(summarise(collect([tmp_path])))
    shown = [(axes.get_title().split(":")[0], axes.get_ylabel().split(" ")[0]) for axes in panels(drawn)]
    assert shown == [
        (d, word) for d in ("covidx", "pets", "tuberculosis") for word in ("Validation", "Validation", "Gain")
    ]
    assert panels(drawn)[0].get_ylabel() == "Validation mean AUROC (%)"
    assert panels(drawn)[3].get_ylabel() == "Validation accuracy (%)"
    assert tuple(drawn.get_size_inches() * drawn.dpi) == (1600, 900)
    assert "no validation" in panels(drawn)[0].texts[0].get_text()  # there is no metrics.jsonl


def test_no_seed_in_common_is_said_in_the_panel(tmp_path: Path) -> None:
    write_runs(tmp_path, {"scratch": [0.5], "zero2": [0.6]})
    write_run(tmp_path / "p0", 0.5, dataset="pets", seed=0)
    write_run(tmp_path / "p1", 0.5, dataset="pets", seed=1, pretrained_model="zero2")
    gain = panels(figure(summarise(collect([tmp_path]))))[2]
    assert gain.get_title().startswith("pets") and gain.texts[0].get_text() == "no seed in common with scratch"


def test_an_interval_longer_than_the_scale_does_not_stretch_it(tmp_path: Path) -> None:
    write_runs(tmp_path, {"scratch": [0.1, 0.9], "zero2": [0.95, 0.05]})
    _, score, gain = panels(figure(summarise(collect([tmp_path]))))
    assert score.get_ylim() == (-3, 103) and gain.get_ylim() == (-103, 103)


def test_styles_differ_and_the_baseline_is_grey() -> None:
    models = ("scratch", *(f"model{i}" for i in range(18)))
    summary = Summary((), models, "scratch")
    styles = [(s["color"], s["marker"], str(s["linestyle"])) for s in (style(summary, model) for model in models)]
    assert len(set(styles)) == len(models)
    assert style(summary, "scratch")["color"] == "#444444"


def test_the_curve_is_of_the_last_cell_with_all_models() -> None:
    def cell(shot: int | None, rows: int) -> Cell:
        return Cell("d", shot, tuple(Row(str(i), None, None, ()) for i in range(rows)))  # type: ignore[arg-type]

    assert curve_cell([cell(1, 3), cell(5, 3), cell(None, 2)]).shot == 5
    assert curve_cell([cell(1, 2), cell(None, 2)]).shot is None


def test_a_half_written_line_ends_a_curve(runs: Path) -> None:
    (result,) = collect([runs / "5-zero2-1"])
    assert read_curve(result) == pytest.approx({0: 20, 100: 51, 200: 61})
    path = result.folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"event": "validation", "step": 300, "accu')
    assert read_curve(result) == pytest.approx({0: 20, 100: 51, 200: 61})
    draw(summarise(collect([runs])), runs.parent / "report.svg")
    assert (runs.parent / "report.svg").read_text().startswith("<?xml")

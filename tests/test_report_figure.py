"""The figures: what their bars, lines and labels say, and that the files which are written are some."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers_report import write_run, write_runs, write_table
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from PIL import Image

from scaletransfer import report_figure
from scaletransfer.report_curves import curves_of
from scaletransfer.report_figure import (
    COLOURS,
    bars,
    few_shot,
    gains,
    learning_curves,
    network_size,
    style,
    write_figures,
)
from scaletransfer.report_inputs import read_inputs
from scaletransfer.summary import Summary, summarise


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


def of(*paths: Path, baseline: str | None = "scratch") -> Summary:
    return summarise(read_inputs(paths).entries, baseline)


def heights(drawn: ErrorbarContainer) -> np.ndarray:
    """The means that were drawn."""
    return np.asarray(drawn.lines[0].get_ydata(), dtype=np.float64)


def panels(drawn: Figure | None) -> list[Axes]:
    assert drawn is not None
    return [axes for axes in drawn.axes if axes.get_xlabel()]


def lines_of(axes: Axes) -> dict[str, ErrorbarContainer]:
    return {str(c.get_label()): c for c in axes.containers if isinstance(c, ErrorbarContainer)}


def test_few_shot_curves_are_drawn_as_measured(runs: Path) -> None:
    drawn = few_shot(of(runs))
    (axes,) = panels(drawn)
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == (
        "xray5",
        "training images per class",
        "accuracy (%)",
    )
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "5", "all"]
    found = lines_of(axes)
    assert list(found) == ["scratch", "third", "zero2"]
    np.testing.assert_allclose(heights(found["zero2"]), [51, 61, 71])
    half = 4.302653 / 3**0.5  # s = 1 point
    (bar,) = found["zero2"].lines[2]
    np.testing.assert_allclose(bar.get_segments()[0][:, 1], [51 - half, 51 + half], rtol=1e-5)
    (no_bar,) = found["third"].lines[2]
    assert sum(np.asarray(segment).size for segment in no_bar.get_segments()) == 0
    places = [np.asarray(c.lines[0].get_xdata(), dtype=np.float64) for c in found.values()]
    assert len({place[0] for place in places}) == 3  # beside one another, and near their tick
    assert all(np.abs(place - place.round()).max() < 0.3 for place in places)
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["scratch", "third", "zero2"]


def test_bars_start_at_zero_and_have_the_means(runs: Path) -> None:
    (axes,) = panels(bars(of(runs)))
    assert axes.get_ylim()[0] == 0
    found = {
        str(c.get_label()): [patch.get_height() for patch in c] for c in axes.containers if c.get_label()[0] != "_"
    }
    assert found["zero2"] == pytest.approx([51, 61, 71]) and found["third"] == pytest.approx([45, 45])
    edges = sorted((patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches)
    assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(edges))  # none stands in another


def test_gains_are_over_the_baseline_and_absent_without_one(runs: Path) -> None:
    (axes,) = panels(gains(of(runs)))
    assert axes.get_ylabel() == "gain over scratch\n(percentage points)"
    found = lines_of(axes)
    assert list(found) == ["third", "zero2"]
    np.testing.assert_allclose(heights(found["zero2"]), [20, 20, 20])
    np.testing.assert_allclose(heights(found["third"]), [15, 5])
    assert gains(of(runs, baseline=None)) is None


def test_learning_curves_are_means_with_bands(runs: Path) -> None:
    entries = read_inputs([runs]).entries
    (axes,) = panels(learning_curves(summarise(entries), curves_of(entries)))
    # the largest number of images that all three models have is 5
    assert axes.get_xlabel() == "fine-tuning step (5 images per class)"
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {"scratch", "third", "zero2"}
    np.testing.assert_allclose(lines["zero2"].get_xydata(), [[0, 20], [100, 51], [200, 61]])
    np.testing.assert_allclose(lines["third"].get_xydata(), [[0, 20], [200, 45]])
    assert len(axes.collections) == 2  # bands of the two models with more than one seed
    band = axes.collections[1].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((20, 62))
    assert learning_curves(summarise(entries), []) is None


def test_the_paper_by_network_size() -> None:
    drawn = network_size(of(Path("paper"), baseline=None))
    axes = {a.get_title(): a for a in panels(drawn)}
    assert len(axes) == 7
    tuberculosis = axes["Tuberculosis"]
    assert [tick.get_text() for tick in tuberculosis.get_xticklabels()] == ["R50x1", "R152x4"]
    found = lines_of(tuberculosis)
    np.testing.assert_allclose(heights(found["CheXpert + MIMIC + NIH + PadChest"]), [81.6529, 90.9091])
    np.testing.assert_allclose(heights(found["ImageNet-21k"]), [83.4711, 80.8264])
    np.testing.assert_allclose(heights(found["NIH ChestX-ray14"]), [78.6777])
    assert tuberculosis.get_xlabel() == "network (all training images)"


def test_one_network_makes_no_figure_by_size(runs: Path) -> None:
    assert network_size(of(runs)) is None


def test_the_files_are_pictures_with_the_models_colours(runs: Path, tmp_path: Path) -> None:
    written = write_figures(of(runs), (), tmp_path / "figures")
    assert sorted(path.name for path in written) == [
        f"{name}.{end}" for name in ("bars", "few_shot", "gains") for end in ("pdf", "png")
    ]
    with Image.open(tmp_path / "figures" / "few_shot.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    for colour in (*COLOURS[:2], "#444444"):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - wanted).sum(axis=2) < 12).sum() > 100, colour
    assert (pixels == 255).all(axis=2).mean() > 0.5
    assert (tmp_path / "figures" / "few_shot.pdf").read_bytes().startswith(b"%PDF")


def test_data_sets_stand_in_panels_of_their_own_with_their_main_metric(tmp_path: Path) -> None:
    for dataset in ("covidx_cxr2", "pets", "padchest", "x"):
        metric = "mean_auroc" if dataset == "padchest" else "accuracy"
        write_runs(tmp_path, {"scratch": [0.5, 0.6], "zero2": [0.6, 0.8]}, dataset=dataset, metric=metric)
    shown = [(axes.get_title(), axes.get_ylabel()) for axes in panels(few_shot(of(tmp_path)))]
    assert shown == [
        ("COVIDx", "accuracy (%)"),
        ("PadChest", "mean AUROC (%)"),
        ("Pets", "accuracy (%)"),
        ("x", "accuracy (%)"),
    ]


def test_an_interval_longer_than_the_scale_does_not_stretch_it(tmp_path: Path) -> None:
    write_runs(tmp_path, {"scratch": [0.1, 0.9], "zero2": [0.95, 0.05]})
    assert panels(few_shot(of(tmp_path)))[0].get_ylim() == (-3, 103)
    assert panels(gains(of(tmp_path)))[0].get_ylim() == (-103, 103)


def test_names_are_no_mathematics(tmp_path: Path) -> None:
    rows = [(0.5, "test/acc", 0, "5_shot", r"$\frac$", r"a$b$\q")]
    summary = of(write_table(tmp_path / "t.csv", rows), baseline=None)
    write_figures(summary, (), tmp_path / "figures")  # matplotlib raises where it cannot parse
    assert (tmp_path / "figures" / "bars.png").exists()


def test_a_bootstrap_interval_that_misses_its_value_is_drawn(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.5, metrics={"accuracy": 0.5, "intervals": {"accuracy": [0.52, 0.6]}})
    (cell,) = of(tmp_path).cells
    lengths = report_figure._ends([cell.rows[0].score])
    np.testing.assert_allclose(lengths, [[0], [10]], atol=1e-9)
    assert not math.isnan(panels(few_shot(of(tmp_path)))[0].get_ylim()[0])


def test_styles_differ_and_the_baseline_is_grey() -> None:
    models = (
        ("scratch", "", ""),
        *((f"model{i:02}", network, "") for i in range(18) for network in ("bit50x1", "bit152x4")),
    )
    summary = Summary((), models, "scratch")
    styles = [(s["color"], s["marker"], str(s["linestyle"])) for s in (style(summary, model) for model in models)]
    assert len(set(styles)) == len(models)
    assert style(summary, models[0])["color"] == "#444444"
    assert (
        style(summary, ("model01", "bit50x1", "paper"))["color"] == style(summary, ("model01", "bit50x1", ""))["color"]
    )

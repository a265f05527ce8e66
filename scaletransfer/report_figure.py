"""The figure of a report: learning curves, scores by number of training images, gains over the baseline."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from scaletransfer.results import Cell, Estimate, Result, Row, Summary, metric_words, shot_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import HashableList

# Okabe and Ito's colours that stand out from white (https://jfly.uni-koeln.de/color/), darker ones first; markers and
# dashes differ too, so that no reader needs the colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("s", "^", "D", "v", "P", "X", "*", "<", ">")
DASHES = ("-", (0, (6, 1.5)), (0, (4, 1, 1, 1)), (0, (1.5, 1)))
BASELINE_STYLE: dict[str, Any] = {"color": "#444444", "marker": "o", "linestyle": (0, (2, 1.5))}
LIMITS = (-3.0, 103.0)  # percent, with room for a marker; an interval may be longer, a score is not


def figure(summary: Summary) -> Figure:
    """A row of panels per data set (a single data set has its curves on the left, the rest stacked on the right).

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("figures need the extra: pip install 'scaletransfer[report]'.") from error
    datasets = summary.by_dataset()
    kinds = ["curve", "score"]
    if any(row.gain is not None for cell in summary.cells for row in cell.rows):
        kinds.append("gain")
    # no pyplot, whose figures stay in memory and which asks for a display
    drawn = Figure(figsize=(16, max(9.0, 3.0 * len(datasets))), dpi=100, layout="constrained")
    names: list[HashableList[str]] = [[f"{kind} {name}" for kind in kinds] for name in datasets]
    if len(datasets) == 1:
        names = [["curve", kind] for kind in kinds[1:]]
    engine = drawn.get_layout_engine()
    assert engine is not None
    engine.set(w_pad=0.12, h_pad=0.08)  # type: ignore[call-arg]
    panels = drawn.subplot_mosaic(names)
    for name, cells in datasets.items():
        ending = "" if len(datasets) == 1 else f" {name}"
        _curves(panels[f"curve{ending}"], summary, cells)
        _scores(panels[f"score{ending}"], summary, cells)
        if "gain" in kinds:
            _gains(panels[f"gain{ending}"], summary, cells)
    _legend(drawn, summary)
    caption = "Bars: 95 % t-interval over seeds. Bands: lowest to highest seed."
    if "gain" in kinds:
        caption += f" Gains are paired by seed; a bar clear of the zero line is a difference to {summary.baseline} "
        caption += "beyond the scatter of the seeds."
    drawn.supxlabel(caption, fontsize=10)
    return drawn


def style(summary: Summary, model: str) -> dict[str, Any]:
    """Colour, marker and dashes of a model: the same in all panels, grey for the baseline."""
    if model == summary.baseline:
        return BASELINE_STYLE
    index = [name for name in summary.models if name != summary.baseline].index(model)
    dash = DASHES[index // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "linestyle": dash}


def curve_cell(cells: list[Cell]) -> Cell:
    """The cell with the most training images that has all models of its data set; else the one with most models."""
    return max(enumerate(cells), key=lambda numbered: (len(numbered[1].rows), numbered[0]))[1]


def read_curve(result: Result) -> dict[int, float]:
    """Step to validation score in percent, from the run's metrics.jsonl; empty without one."""
    path = result.folder / "metrics.jsonl"
    curve: dict[int, float] = {}
    if not path.exists():
        return curve
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # a process was killed while it wrote this line; what it wrote again after that has other steps
        if row.get("event") == "validation" and row.get(result.metric) is not None:
            curve[int(row["step"])] = 100 * float(row[result.metric])
    return curve


def _curves(axes: Axes, summary: Summary, cells: list[Cell]) -> None:
    cell = curve_cell(cells)
    single = False
    for row in cell.rows:
        curves = [curve for result in row.results if (curve := read_curve(result))]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        if not steps:
            continue
        values = np.array([[curve[step] for step in steps] for curve in curves])
        look = style(summary, row.model)
        axes.plot(steps, values.mean(axis=0), label=row.model, markersize=6, linewidth=1.8, **look)
        if len(curves) > 1:
            axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=look["color"], alpha=0.15, lw=0)
        single |= len(curves) == 1
    axes.set_title(f"{cell.dataset}: {shot_words(cell.shot)}" + " (no band: one seed)" * single)
    axes.set(xlabel="Fine-tuning step", ylabel=f"Validation {metric_words(cell.sample.metric)}")
    if not axes.lines:
        axes.text(0.5, 0.5, "no validation in metrics.jsonl", ha="center", transform=axes.transAxes)
    _finish(axes, LIMITS)


def _scores(axes: Axes, summary: Summary, cells: list[Cell]) -> None:
    single = _by_shot(axes, summary, cells, gains=False)
    axes.set_title(f"{cells[0].dataset}: after fine-tuning" + " (no bar: one seed)" * single)
    axes.set_ylabel(f"Validation {metric_words(cells[0].sample.metric)}")
    _finish(axes, LIMITS)


def _gains(axes: Axes, summary: Summary, cells: list[Cell]) -> None:
    axes.axhline(0, color=BASELINE_STYLE["color"], linestyle=BASELINE_STYLE["linestyle"], linewidth=1.2)
    single = _by_shot(axes, summary, cells, gains=True)
    axes.set_title(f"{cells[0].dataset}: gain over {summary.baseline}" + " (no bar: one pair)" * single)
    axes.set_ylabel(f"Gain over {summary.baseline}\n(percentage points)")
    if not axes.containers:
        text = f"no seed in common with {summary.baseline}"
        axes.text(0.5, 0.6, text, ha="center", transform=axes.transAxes)
    _finish(axes, (-103.0, 103.0))


def _by_shot(axes: Axes, summary: Summary, cells: list[Cell], *, gains: bool) -> bool:
    """Points with bars over the numbers of training images, the models beside one another; whether a bar is missing."""
    models = [model for model in summary.models if not (gains and model == summary.baseline)]
    single = False
    for index, model in enumerate(models):
        shift = min(0.3, 0.1 * len(cells)) * ((index + 0.5) / len(models) - 0.5)
        places, means, low, high = [], [], [], []
        for place, cell in enumerate(cells):
            estimate = _estimate(next((row for row in cell.rows if row.model == model), None), gains)
            if estimate is None:
                continue
            ends = estimate.interval or (math.nan, math.nan)
            single |= estimate.interval is None
            places.append(place + shift)
            means.append(estimate.mean)
            low.append(estimate.mean - ends[0])
            high.append(ends[1] - estimate.mean)
        if places:
            look = style(summary, model)
            axes.errorbar(places, means, yerr=[low, high], label=model, capsize=4, linewidth=1.4, markersize=7, **look)
    axes.set_xticks(range(len(cells)), ["all" if cell.shot is None else str(cell.shot) for cell in cells])
    axes.set_xlim(-0.5, len(cells) - 0.5)
    axes.set_xlabel("Training images per class")
    return single


def _estimate(row: Row | None, gains: bool) -> Estimate | None:
    if row is None:
        return None
    return row.gain if gains else row.score


def _finish(axes: Axes, limits: tuple[float, float]) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, limits[0]), min(high, limits[1]))
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(drawn: Figure, summary: Summary) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], label=f"{model} (baseline)" if model == summary.baseline else model, **style(summary, model))
        for model in summary.models
    ]
    drawn.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 6), frameon=False, fontsize=11)

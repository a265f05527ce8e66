"""The figures of a report as files: bars by shot, lines by network size, few-shot curves, learning curves, gains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scaletransfer.report_curves import LOSS, Curve
from scaletransfer.result_names import lower_is_better, metric_title, model_title, network_order, network_title, title
from scaletransfer.results import Estimate, shot_words
from scaletransfer.summary import Cell, Row, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import HashableList

Model = tuple[str, str, str]
# Okabe and Ito's colours that stand out from white (https://jfly.uni-koeln.de/color/) and four more; markers and dashes
# differ too, so that no reader needs the colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4FB0", "#8C1C13", "#6B7A00", "#3B4A5A")
MARKERS = ("s", "^", "D", "v", "P", "X", "*", "<", ">", "p")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (4, 1, 1, 1)))
HATCHES = ("", "////", "....", "xxxx")
BASELINE_COLOUR, BASELINE_MARKER = "#444444", "o"
LIMITS = (-3.0, 103.0)  # percent, with room for a marker; an interval may be longer, a score is not
ENDINGS = ("png", "pdf")


def write_figures(summary: Summary, curves: Sequence[Curve], folder: Path) -> list[Path]:
    """Draw every figure that there is something for, as .png and .pdf. ValueError where matplotlib is not installed."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Figure | None] = {
        "bars": bars(summary),
        "network_size": network_size(summary),
        "few_shot": few_shot(summary),
        "learning_curves": learning_curves(summary, curves),
        "gains": gains(summary),
    }
    written = []
    for name, figure in drawn.items():
        for ending in ENDINGS if figure is not None else ():
            written.append(folder / f"{name}.{ending}")
            assert figure is not None
            figure.savefig(written[-1])
    return written


def style(summary: Summary, model: Model) -> dict[str, Any]:
    """Colour and marker of a pre-training, dashes of a network: the same in all figures, grey for the baseline."""
    pretraining, network, source = model
    names = _pretrainings(summary)
    if pretraining == summary.baseline and not source:
        colour, marker = BASELINE_COLOUR, BASELINE_MARKER
    else:
        place = [name for name in names if name != summary.baseline].index(pretraining)
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[(place + 3 * (place // 10)) % len(MARKERS)]
    number = _networks(summary).index(network)
    look = {"color": colour, "marker": marker, "linestyle": DASHES[number % len(DASHES)]}
    return look | ({"markerfacecolor": "white", "alpha": 0.75} if source else {})


def _pretrainings(summary: Summary) -> list[str]:
    return sorted({model[0] for model in summary.models})


def _networks(summary: Summary) -> list[str]:
    return sorted({model[1] for model in summary.models}, key=network_order, reverse=True)


def bars(summary: Summary) -> Figure:
    """Per target a group of bars for each number of training images, a bar a model."""

    def draw(axes: Axes, cells: Sequence[Cell]) -> None:
        models = _models_of(summary, cells)
        width = 0.84 / len(models)
        for place, model in enumerate(models):
            estimates = [_score(cell, model) for cell in cells]
            spots = [n + width * (place + 0.5) - 0.42 for n, e in enumerate(estimates) if e is not None]
            there = [e for e in estimates if e is not None]
            look = style(summary, model)
            hatch = HATCHES[_networks(summary).index(model[1]) % len(HATCHES)]
            axes.bar(
                spots,
                [e.mean for e in there],
                width=0.9 * width,
                label=model_title(*model),
                color=look["color"],
                alpha=0.45 if model[2] else 0.85,
                hatch=hatch,
                edgecolor="white",
                linewidth=0,
            )
            axes.errorbar(spots, [e.mean for e in there], yerr=_ends(there), fmt="none", ecolor="#222222", lw=0.9)
        _shots(axes, cells)
        _finish(axes, cells[0].metric, from_zero=True)

    return _panels(summary, summary.by_dataset(), draw, "Bars: 95 % intervals. ")


def few_shot(summary: Summary) -> Figure:
    """Per target the score over the number of training images, a line a model, with intervals."""

    def draw(axes: Axes, cells: Sequence[Cell]) -> None:
        models = _models_of(summary, cells)
        _by_shot(axes, summary, cells, models, _score)
        _finish(axes, cells[0].metric)

    return _panels(summary, summary.by_dataset(), draw, "Bars: 95 % intervals. ")


def gains(summary: Summary) -> Figure | None:
    """Per target the gain over the baseline, paired by seed; None where there is none."""
    with_gain = {
        name: cells
        for name, cells in summary.by_dataset().items()
        if any(row.gain is not None for cell in cells for row in cell.rows)
    }
    if not with_gain:
        return None

    def draw(axes: Axes, cells: Sequence[Cell]) -> None:
        axes.axhline(0, color=BASELINE_COLOUR, linestyle=(0, (2, 1.5)), linewidth=1.2)
        there = {row.model for cell in cells for row in cell.rows if row.gain is not None}
        models = [model for model in _models_of(summary, cells) if model in there]
        _by_shot(axes, summary, cells, models, _gain)
        _finish(axes, cells[0].metric, limits=(-103.0, 103.0))
        axes.set_ylabel(f"gain over {title(summary.baseline or '')}\n(percentage points)")

    note = f"Gains are paired by seed; a bar clear of zero is a difference to {title(summary.baseline or '')} beyond "
    return _panels(summary, with_gain, draw, f"{note}the scatter of the seeds. ")


def network_size(summary: Summary) -> Figure | None:
    """Per target, with all (else the most) training images, the score over the network's size, a line a pre-training;
    None where there is only one network."""
    sizes = sorted({model[1] for model in summary.models if model[1]}, key=network_order)
    if len(sizes) < 2:
        return None

    def draw(axes: Axes, cells: Sequence[Cell]) -> None:
        cell = cells[-1]
        models = [model for model in _models_of(summary, cells) if _score(cell, model) is not None and model[1]]
        lines = list(dict.fromkeys((pretraining, source) for pretraining, _, source in models))
        for number, (pretraining, source) in enumerate(lines):
            mine = [model for model in models if (model[0], model[2]) == (pretraining, source)]
            there = [e for model in mine if (e := _score(cell, model)) is not None]
            shift = 0.16 * ((number + 0.5) / len(lines) - 0.5)
            spots = [sizes.index(model[1]) + shift for model in mine]
            look = style(summary, mine[-1]) | {"linestyle": "-"}
            label = title(pretraining) + (f" ({source})" if source else "")
            axes.errorbar(spots, [e.mean for e in there], yerr=_ends(there), label=label, capsize=3, lw=1.4, **look)
        axes.set_xticks(range(len(sizes)), [network_title(size) for size in sizes])
        axes.set_xlim(-0.5, len(sizes) - 0.5)
        axes.set_xlabel(f"network ({shot_words(cell.shot)})")
        _finish(axes, cell.metric)

    return _panels(summary, summary.by_dataset(), draw, "Bars: 95 % intervals. ")


def learning_curves(summary: Summary, curves: Sequence[Curve]) -> Figure | None:
    """Per target the validation score over the steps, for the most images that most models have; None without any."""
    by_dataset: dict[str, list[Curve]] = {}
    for curve in curves:
        if curve.metric != LOSS:
            by_dataset.setdefault(curve.dataset, []).append(curve)
    datasets = {name: cells for name, cells in summary.by_dataset().items() if name in by_dataset}
    if not datasets:
        return None

    def draw(axes: Axes, cells: Sequence[Cell]) -> None:
        mine = by_dataset[cells[0].dataset]
        shots = [cell.shot for cell in cells]
        count = [sum(curve.shot == shot for curve in mine) for shot in shots]
        shot = shots[max(range(len(shots)), key=lambda place: (count[place], place))]
        for curve in (curve for curve in mine if curve.shot == shot):
            model = (curve.pretraining, curve.network, "")
            look = style(summary, model)
            axes.plot(curve.steps, curve.mean, label=model_title(*model), markersize=5, linewidth=1.6, **look)
            if curve.seeds > 1:
                axes.fill_between(curve.steps, curve.low, curve.high, color=look["color"], alpha=0.15, lw=0)
        axes.set_xlabel(f"fine-tuning step ({shot_words(shot)})")
        _finish(axes, cells[0].metric)

    return _panels(summary, datasets, draw, "Bands: lowest to highest seed. ")


Draw = Callable[["Axes", Sequence[Cell]], None]


def _panels(summary: Summary, datasets: dict[str, list[Cell]], draw: Draw, note: str) -> Figure:
    """A panel per data set, up to three beside one another, one legend above.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("figures need the extra: pip install 'scaletransfer[report]'.") from error
    columns = min(3, len(datasets))
    rows = math.ceil(len(datasets) / columns)
    size = (16.0 if columns > 1 else 10.0, max(6.0, 4.2 * rows) + 1.0)
    # no pyplot, whose figures stay in memory and which asks for a display
    drawn = Figure(figsize=size, dpi=100, layout="constrained")
    names: list[HashableList[str]] = [
        [str(n) if n < len(datasets) else "." for n in range(row * columns, (row + 1) * columns)] for row in range(rows)
    ]
    panels = drawn.subplot_mosaic(names)
    handles: dict[str, Any] = {}
    for number, (name, cells) in enumerate(datasets.items()):
        axes = panels[str(number)]
        draw(axes, cells)
        axes.set_title(_plain(title(name)))
        found, labels = axes.get_legend_handles_labels()
        handles |= {label: handle for label, handle in zip(labels, found, strict=True) if label not in handles}
    wide = 3 if columns > 1 else 2
    order = [model_title(*model) for model in summary.models]
    labels = sorted(handles, key=lambda label: order.index(label) if label in order else len(order))
    drawn.legend(
        [handles[label] for label in labels],
        list(map(_plain, labels)),
        loc="outside upper center",
        ncols=wide,
        frameon=False,
        fontsize=9,
    )
    drawn.supxlabel(note + _kinds(datasets), fontsize=9)
    return drawn


def _plain(text: str) -> str:
    """A name as it is: matplotlib would take what stands between dollars for mathematics."""
    return text.replace("$", r"\$")


def _kinds(datasets: dict[str, list[Cell]]) -> str:
    kinds = {row.score.kind for cells in datasets.values() for cell in cells for row in cell.rows}
    words = {
        "seeds": "Student's t over seeds",
        "bootstrap": "of a single seed the bootstrap of its validation set",
        "": "no bar: one seed of which nothing more is known",
    }
    return "Intervals: " + "; ".join(words[kind] for kind in words if kind in kinds) + "."


def _models_of(summary: Summary, cells: Sequence[Cell]) -> list[Model]:
    there = {row.model for cell in cells for row in cell.rows}
    return [model for model in summary.models if model in there]


def _row(cell: Cell, model: Model) -> Row | None:
    return next((row for row in cell.rows if row.model == model), None)


def _score(cell: Cell, model: Model) -> Estimate | None:
    row = _row(cell, model)
    return None if row is None else row.score


def _gain(cell: Cell, model: Model) -> Estimate | None:
    row = _row(cell, model)
    return None if row is None else row.gain


def _ends(estimates: Sequence[Estimate]) -> np.ndarray:
    """Lengths of the bars below and above the means [2, n]; NaN where there is no interval."""
    lengths = []
    for e in estimates:
        low, high = e.interval or (math.nan, math.nan)
        # a bootstrap interval need not hold the value itself, and matplotlib takes no negative length
        lengths.append((e.mean - min(low, e.mean), max(high, e.mean) - e.mean) if e.interval else (low, high))
    return np.array(lengths, dtype=np.float64).reshape(-1, 2).T


def _by_shot(
    axes: Axes,
    summary: Summary,
    cells: Sequence[Cell],
    models: Sequence[Model],
    estimate: Callable[[Cell, Model], Estimate | None],
) -> None:
    """Points with bars over the numbers of training images, the models beside one another."""
    for number, model in enumerate(models):
        shift = 0.5 * ((number + 0.5) / len(models) - 0.5)
        found = [(place + shift, e) for place, cell in enumerate(cells) if (e := estimate(cell, model)) is not None]
        spots, there = [spot for spot, _ in found], [e for _, e in found]
        look = style(summary, model)
        label = model_title(*model)
        axes.errorbar(
            spots, [e.mean for e in there], yerr=_ends(there), label=label, capsize=2, lw=1.2, markersize=5, **look
        )
    _shots(axes, cells)


def _shots(axes: Axes, cells: Sequence[Cell]) -> None:
    axes.set_xticks(range(len(cells)), ["all" if cell.shot is None else str(cell.shot) for cell in cells])
    axes.set_xlim(-0.5, len(cells) - 0.5)
    axes.set_xlabel("training images per class")


def _finish(axes: Axes, metric: str, *, from_zero: bool = False, limits: tuple[float, float] = LIMITS) -> None:
    axes.set_ylabel(_plain(metric_title(metric)))
    low, high = axes.get_ylim()
    if not lower_is_better(metric):
        low, high = max(low, limits[0]), min(high, limits[1])
    axes.set_ylim(0.0 if from_zero else low, high)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

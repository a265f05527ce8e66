"""Means over seeds side by side: what is better beyond chance, and gains over a baseline paired by seed.

A cell is one data set, one metric, one number of training images per class; models are compared inside a cell only.
Intervals are Student's t over seeds, or of a single seed the bootstrap of its validation set; each is for one
comparison, none is corrected for how many there are.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scaletransfer.result_names import lower_is_better, model_title, network_order
from scaletransfer.result_rows import Entry
from scaletransfer.results import BASELINE, Estimate, shot_order


@dataclass(frozen=True)
class Row:
    """A model in a cell.

    ``gain`` over the baseline is None for the baseline, and where they share no seed. ``best``: its interval lies clear
    of those of all other models of its source in this cell, on the better side.
    """

    entry: Entry
    gain: Estimate | None = None
    best: bool = False

    @property
    def score(self) -> Estimate:
        return self.entry.estimate

    @property
    def model(self) -> tuple[str, str, str]:
        """Pre-training, network and source."""
        return (self.entry.pretraining, self.entry.network, self.entry.source)

    @property
    def title(self) -> str:
        return model_title(*self.model)


@dataclass(frozen=True)
class Cell:
    """One data set, metric and number of training images per class (None: all); a row per model."""

    dataset: str
    metric: str
    shot: int | None
    main: bool
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Summary:
    """All cells, by data set, metric (the main one first) and from few to all images; models as they are shown."""

    cells: tuple[Cell, ...]
    models: tuple[tuple[str, str, str], ...]
    baseline: str | None

    def by_dataset(self, *, main: bool = True) -> dict[str, list[Cell]]:
        """The cells of each data set; with ``main`` those of its main metric alone."""
        found: dict[str, list[Cell]] = defaultdict(list)
        for cell in self.cells:
            if cell.main or not main:
                found[cell.dataset].append(cell)
        return found


def summarise(entries: Sequence[Entry], baseline: str | None = BASELINE) -> Summary:
    """Cells with the best of each marked, and gains over ``baseline`` (a pre-training's or a model's name; None: none).

    Raises:
        ValueError: two means of one model in one cell, or no result of the baseline.
    """
    seen: dict[tuple[object, ...], Entry] = {}
    for entry in entries:
        if first := seen.get(entry.key):
            raise ValueError(f"{first.where} and {entry.where} are of the same runs: leave one of them out")
        seen[entry.key] = entry
    if baseline is not None:
        check_baseline(entries, baseline)
    models = sorted({(e.pretraining, e.network, e.source) for e in entries}, key=lambda m: _order(m, baseline))
    cells: dict[tuple[str, str, int | None], list[Entry]] = defaultdict(list)
    for entry in sorted(entries, key=lambda e: (e.dataset, not e.main, e.metric, shot_order(e.shot))):
        cells[(entry.dataset, entry.metric, entry.shot)].append(entry)
    return Summary(
        tuple(
            Cell(dataset, metric, shot, bool(members[0].main), _rows(members, models, baseline))
            for (dataset, metric, shot), members in cells.items()
        ),
        tuple(models),
        baseline,
    )


def check_baseline(entries: Sequence[Entry], baseline: str) -> None:
    """ValueError, with the nearest name, where there is no result of the baseline."""
    names = {e.pretraining for e in entries} | {_name(e) for e in entries}
    if baseline not in names:
        close = difflib.get_close_matches(baseline, sorted(names), n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        there = ", ".join(sorted({e.pretraining for e in entries}))
        raise ValueError(f"there is no run of the baseline {baseline!r}{hint}: there are {there}")


def is_baseline(entry: Entry, baseline: str | None) -> bool:
    """Whether gains are over this model."""
    return baseline is not None and not entry.source and baseline in (entry.pretraining, _name(entry))


def _name(entry: Entry) -> str:
    return "_".join(part for part in (entry.pretraining, entry.network) if part)


def _order(model: tuple[str, str, str], baseline: str | None) -> tuple[object, ...]:
    pretraining, network, source = model
    return (source, pretraining != baseline, network_order(network), pretraining)


def _rows(members: Sequence[Entry], models: Sequence[tuple[str, str, str]], baseline: str | None) -> tuple[Row, ...]:
    place = {model: number for number, model in enumerate(models)}
    ordered = sorted(members, key=lambda e: place[(e.pretraining, e.network, e.source)])
    rows = [Row(entry, _gain(entry, members, baseline)) for entry in ordered]
    for source in {entry.source for entry in members}:
        best = _best([row for row in rows if row.entry.source == source])
        rows = [replace(row, best=True) if row is best else row for row in rows]
    return tuple(rows)


def _best(rows: Sequence[Row]) -> Row | None:
    """The row whose interval touches no other's; None where intervals overlap or one is not known, or for one row."""
    if len(rows) < 2 or any(row.score.interval is None for row in rows):
        return None
    sign = -1.0 if lower_is_better(rows[0].entry.metric) else 1.0

    def ends(row: Row) -> tuple[float, float]:
        assert row.score.interval is not None
        low, high = (sign * end for end in row.score.interval)
        return min(low, high), max(low, high)

    first = max(rows, key=lambda row: sign * row.score.mean)
    clear = all(ends(first)[0] > ends(row)[1] for row in rows if row is not first)
    return first if clear else None


def _gain(entry: Entry, members: Sequence[Entry], baseline: str | None) -> Estimate | None:
    """Over the baseline with the same network; where it does not say its network, only if all others have one."""
    if baseline is None or entry.source or is_baseline(entry, baseline):
        return None
    bases = [e for e in members if is_baseline(e, baseline)]
    same = [e for e in bases if e.network == entry.network or baseline == _name(e) != e.pretraining]
    networks = {e.network for e in members if not e.source and e.network}
    if not same and len(networks) == 1:
        same = [e for e in bases if not e.network]
    if len(same) != 1:
        return None
    gains = {seed: value - same[0].values[seed] for seed, value in entry.values.items() if seed in same[0].values}
    return Estimate.of(gains) if gains else None

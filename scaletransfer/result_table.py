"""Tables of results: the paper's released CSV files, those of `scaletransfer report` and `sweep`, means over seeds.

Every value is in percent where the metric is a share. The released files hold shares under names such as "test/acc";
a file whose values of a metric all lie in 0 to 1 holds shares, any other percent.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from scaletransfer.result_names import canonical_metric, lower_is_better, parse_shot, published_metric, shot_name
from scaletransfer.result_names import split_model as model_of
from scaletransfer.result_rows import Entry, Score
from scaletransfer.results import Estimate, t_interval

COLUMNS = ("metric_value", "metric", "path", "seed", "shot", "pretrained_model", "dataset", "last_step")
MEANS = ("dataset", "metric", "model", "pretraining", "shot", "n_seeds", "mean", "std_ddof1")
PACKAGED = Path(__file__).with_name("paper_results.csv")
"""What the paper reports: means over seeds from arXiv 2106.00116."""


class _Row:
    """One row of a table, whose cells are read by the name of their column; errors say file, line and column."""

    def __init__(self, path: Path, line: int, cells: dict[str, str]) -> None:
        self.path, self.line, self.cells = path, line, cells

    def refuse(self, column: str, why: str) -> ValueError:
        return ValueError(f"{self.path}, line {self.line}, column {column}: {why}")

    def text(self, column: str) -> str:
        value = self.cells[column].strip()
        if not value:
            raise self.refuse(column, "there is nothing; give a value, or leave the row out")
        return value

    def number(self, column: str) -> float:
        value = self.text(column)
        try:
            found = float(value)
        except ValueError:
            found = math.nan
        if not math.isfinite(found):
            raise self.refuse(column, f"{value!r} is not a finite number; correct it, or leave the row out")
        return found

    def integer(self, column: str, least: int = 0) -> int:
        found = self.number(column)
        if found != int(found) or found < least:
            raise self.refuse(column, f"{self.text(column)!r} is not a whole number of at least {least}")
        return int(found)

    def integers(self, column: str) -> tuple[int, ...]:
        """Numbers with spaces between; () where the table has no such column or nothing in it."""
        try:
            return tuple(int(word) for word in self.cells.get(column, "").split())
        except ValueError:
            raise self.refuse(column, f"{self.cells[column]!r} is not a list of whole numbers") from None

    def shot(self) -> int | None:
        try:
            return parse_shot(self.text("shot"))
        except ValueError as error:
            raise self.refuse("shot", str(error).partition("column shot: ")[2] or str(error)) from None


def read_table(path: Path) -> tuple[list[Score], list[Entry], list[str]]:
    """The scores of single runs, or the means over seeds, that a CSV file holds; and notes on how it was read.

    Raises:
        ValueError: one sentence with the file, the line and the column.
    """
    header, rows = _rows(path)
    if set(COLUMNS) <= set(header):
        scores, notes = _read_scores(path, rows)
        return scores, [], notes
    if set(MEANS) <= set(header):
        means = [_mean(row) for row in rows]
        return [], means, _doubtful(path, means)
    wanted, kind = (MEANS, "means over seeds") if {"mean", "n_seeds"} & set(header) else (COLUMNS, "results of runs")
    absent = [name for name in wanted if name not in header]
    raise ValueError(
        f"{path}, line 1, column {absent[0]}: the header lacks {', '.join(absent)}; a table of {kind} has the columns "
        f"{', '.join(wanted)}"
    )


def _rows(path: Path) -> tuple[list[str], list[_Row]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: this is not UTF-8 text, so no table of results") from None
    lines = iter(enumerate(text.splitlines(keepends=True), start=1))
    numbered = [(number, line) for number, line in lines if not line.startswith("#")]
    records = _records(path, numbered)
    header = [name.strip() for name in next(records, (1, []))[1]]
    if not header:
        raise ValueError(f"{path} is empty: give a table with the columns {', '.join(COLUMNS)}")
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise ValueError(f"{path}, line {numbered[0][0]}, column {twice[0]}: the header has this column twice")
    rows = []
    for line, cells in records:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            place = header[min(len(cells), len(header) - 1)]
            raise ValueError(
                f"{path}, line {line}, column {place}: there are {len(cells)} cells, the header has {len(header)}"
            )
        rows.append(_Row(path, line, dict(zip(header, cells, strict=True))))
    return header, rows


def _records(path: Path, numbered: Sequence[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
    """Cells of each record with the number of its first line in the file, where comments count as well."""
    reader = csv.reader((line for _, line in numbered), strict=True)
    while True:
        begins = reader.line_num
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            line = numbered[min(begins, len(numbered) - 1)][0]
            raise ValueError(f"{path}, line {line}: this is no CSV ({error})") from None
        yield numbered[begins][0], cells


def _read_scores(path: Path, rows: Sequence[_Row]) -> tuple[list[Score], list[str]]:
    found: dict[str, list[tuple[Score, _Row]]] = {}
    for row in rows:
        named = row.text("metric")
        pretraining, network = model_of(row.text("pretrained_model"))
        score = Score(
            dataset=row.text("dataset"),
            metric=canonical_metric(named),
            pretraining=pretraining,
            network=network,
            shot=row.shot(),
            seed=row.integer("seed"),
            value=row.number("metric_value"),
            last_step=row.integer("last_step"),
            path=row.cells["path"].strip(),
            where=f"{path}, line {row.line}",
        )
        found.setdefault(named, []).append((score, row))
    scores, notes = [], []
    for named, members in found.items():
        if lower_is_better(canonical_metric(named)):
            scores += [score for score, _ in members]
            continue
        shares = _are_shares(named, members)
        scores += [replace(score, value=100 * score.value) if shares else score for score, _ in members]
        if shares != ("/" in named):  # not as it is published: test/acc is a share, test_acc is percent
            what = "shares of one, as no value is above 1" if shares else "percent, as values are above 1"
            notes.append(f"{path}: {named} is read as {what}")
    return scores, notes


def _are_shares(named: str, members: Sequence[tuple[Score, _Row]]) -> bool:
    """Whether a metric's values in one file are shares of one; ValueError where a value fits neither unit."""
    for score, row in members:
        if not 0 <= score.value <= 100:
            raise row.refuse("metric_value", f"{score.value:g} is neither a share nor percent of {named}")
    above = [(score, row) for score, row in members if score.value > 1]
    below = sum(0 < score.value <= 1 for score, _ in members)
    if above and below >= len(above):
        score, row = above[0]
        raise row.refuse(
            "metric_value", f"{score.value:g} is above 1, but most values of {named} in this file are shares of one"
        )
    return not above


def _mean(row: _Row) -> Entry:
    count = row.integer("n_seeds", 1)
    mean, std = row.number("mean"), row.number("std_ddof1") if count > 1 else None
    metric = canonical_metric(row.text("metric"))
    if not lower_is_better(metric) and not 0 <= mean <= 100:
        raise row.refuse("mean", f"{mean:g} is no percentage, as means of {metric} are")
    if std is not None and std < 0:
        raise row.refuse("std_ddof1", f"{std:g} is below 0")
    seeds = row.integers("seeds")
    if seeds and len(seeds) != count:
        raise row.refuse("seeds", f"there are {len(seeds)}, but n_seeds is {count}")
    least, most = (row.number(name) if row.cells.get(name, "").strip() else None for name in ("min", "max"))
    interval, kind = (t_interval(mean, std, count), "seeds") if std is not None else (None, "")
    if count == 1 and row.cells.get("interval") == "bootstrap":
        interval, kind = (row.number("low"), row.number("high")), "bootstrap"
    primary = row.cells.get("primary", "").strip()
    if primary not in ("", "True", "False"):
        raise row.refuse("primary", f"{primary!r} is neither True nor False")
    return Entry(
        dataset=row.text("dataset"),
        metric=metric,
        pretraining=row.text("pretraining"),
        network=row.cells["model"].strip(),
        shot=row.shot(),
        estimate=Estimate(seeds or tuple(range(count)), mean, interval, kind, std, least, most),
        last_steps=row.integers("last_steps"),
        where=f"{row.path}, line {row.line}",
        main=primary == "True" if primary else None,
        source=row.cells.get("source", "").strip(),
    )


def _doubtful(path: Path, means: Sequence[Entry]) -> list[str]:
    """A note on each metric whose means, which are percent, look like shares of one."""
    highest: dict[str, float] = {}
    for entry in means:
        if not lower_is_better(entry.metric):
            highest[entry.metric] = max(highest.get(entry.metric, 0.0), entry.estimate.mean)
    return [
        f"{path}: means are percent, and none of {metric} is above 1; multiply them by 100 if they are shares of one"
        for metric, value in highest.items()
        if 0 < value <= 1
    ]


def write_scores(scores: Sequence[Score], path: Path) -> None:
    """The published columns: a row per run and metric, in shares of one, under the published names."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for s in scores:
            value = s.value if lower_is_better(s.metric) else s.value / 100
            model = "_".join(part for part in (s.pretraining, s.network) if part)
            shown = f"{value:.12g}", published_metric(s.metric), s.path, s.seed, shot_name(s.shot)
            writer.writerow([*shown, model, s.dataset, s.last_step])

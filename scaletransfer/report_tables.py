"""Tables of a report: one content, written as Markdown, CSV, LaTeX, and for a terminal."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scaletransfer.result_names import (
    lower_is_better,
    metric_title,
    model_title,
    network_title,
    published_metric,
    shot_name,
    title,
)
from scaletransfer.result_rows import Entry
from scaletransfer.results import Estimate, shot_words
from scaletransfer.summary import Cell, Row, Summary

BEST = "Bold: its interval lies clear of those of all others in its column; none is bold where intervals overlap."
SUMMARY_COLUMNS = (
    *("dataset", "metric", "primary", "model", "pretraining", "shot", "n_seeds", "mean", "std_ddof1", "std_ddof0"),
    *("min", "max", "seeds", "last_steps", "low", "high", "interval", "best", "source"),
)


@dataclass(frozen=True)
class Value:
    """A number in a table with its interval."""

    estimate: Estimate
    best: bool = False
    signed: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of texts, numbers and gaps (None) under a header; ``notes`` stand below it. name: of its files."""

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str | Value | None, ...], ...]
    notes: tuple[str, ...]


def tables_of(summary: Summary) -> list[Table]:
    """The full-shot table over all targets, and for each target and metric its table by number of images."""
    full = [cell for cell in summary.cells if cell.main and cell.shot is None]
    found = [_pivot("full_shot", "All training images, main metric of each target", full, _target_head)] if full else []
    for cells in _by_metric(summary).values():
        one = cells[0]
        name = one.dataset if one.main else f"{one.dataset}_{one.metric}"
        head = f"{title(one.dataset)}: {metric_title(one.metric)}"
        found.append(_pivot(name, head, cells, lambda cell: shot_words(cell.shot)))
    return found


def _by_metric(summary: Summary) -> dict[tuple[str, str], list[Cell]]:
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in summary.cells:
        found.setdefault((cell.dataset, cell.metric), []).append(cell)
    return found


def _target_head(cell: Cell) -> str:
    return f"{title(cell.dataset)}, {metric_title(cell.metric)}"


def _pivot(name: str, head: str, cells: Sequence[Cell], column: Callable[[Cell], str]) -> Table:
    by_model: dict[tuple[str, str, str], list[Value | None]] = {}
    for place, cell in enumerate(cells):
        for row in cell.rows:
            values = by_model.setdefault(row.model, [None] * len(cells))
            values[place] = Value(row.score, row.best)
    models = sorted(by_model, key=_place_in(cells))
    rows = [(title(p) + (f" ({s})" if s else ""), network_title(n), *by_model[(p, n, s)]) for p, n, s in models]
    shown = [value.estimate for values in by_model.values() for value in values if value is not None]
    header = ("pre-training", "network", *(column(cell) for cell in cells))
    return Table(name, head, header, tuple(rows), (*interval_notes(shown), BEST))


def _place_in(cells: Sequence[Cell]) -> Callable[[tuple[str, str, str]], tuple[str, float]]:
    order: dict[tuple[str, str, str], float] = {}
    longest = sorted(cells, key=lambda cell: -len(cell.rows))
    for cell in longest:
        for place, row in enumerate(cell.rows):
            order.setdefault(row.model, place)
    return lambda model: (model[2], order[model])


def interval_notes(estimates: Iterable[Estimate]) -> list[str]:
    """What the intervals are, by the kinds that occur."""
    kinds = {estimate.kind for estimate in estimates}
    notes = []
    if "seeds" in kinds:
        notes.append("Intervals: 95 %, Student's t over seeds.")
    if "bootstrap" in kinds:
        notes.append("†: one seed; its 95 % interval is the bootstrap of that run's validation set.")
    if "" in kinds:
        notes.append("Without an interval: one seed, of which nothing more is known.")
    return notes


def comparison(summary: Summary, source: str) -> Table | None:
    """Ours beside the same model's in ``source``, where both have a value; None where they share nothing."""
    rows: list[tuple[str | Value | None, ...]] = []
    estimates = []
    for cell in summary.cells:
        theirs = {row.model[:2]: row for row in cell.rows if row.entry.source == source}
        for row in (row for row in cell.rows if not row.entry.source):
            other = theirs.get(row.model[:2])
            if other is None:
                continue
            estimates += [row.score, other.score]
            rows.append(
                (
                    _target_head(cell),
                    shot_words(cell.shot),
                    model_title(*row.model),
                    Value(row.score),
                    Value(other.score),
                    f"{row.score.mean - other.score.mean:+.2f}",
                    _apart(row, other),
                )
            )
    if not rows:
        return None
    header = ("target", "training images", "model", "here", source, "difference", "intervals")
    return Table("comparison", f"Beside {source}", header, tuple(rows), tuple(interval_notes(estimates)))


def _apart(one: Row, other: Row) -> str:
    if one.score.interval is None or other.score.interval is None:
        return "not both known"
    (a, b), (c, d) = one.score.interval, other.score.interval
    return "overlap" if a <= d and c <= b else "apart"


def text_of(value: str | Value | None, *, plus_minus: str = "±") -> str:
    """A cell's text: "90.91 ± 1.03", "74.00 [61.20, 83.10]†", "50.00", or "" for a gap."""
    if value is None or isinstance(value, str):
        return value or ""
    estimate, sign = value.estimate, "+" if value.signed else ""
    mean = f"{estimate.mean:{sign}.2f}"
    if estimate.interval is None:
        return mean
    low, high = estimate.interval
    if estimate.kind == "bootstrap":
        return f"{mean} [{low:.2f}, {high:.2f}]†"
    return f"{mean} {plus_minus} {(high - low) / 2:.2f}"


def to_markdown(table: Table) -> str:
    """A GitHub table; names are escaped, so that none becomes markup."""

    def cell(value: str | Value | None) -> str:
        shown = _escape_markdown(text_of(value))
        return f"**{shown}**" if isinstance(value, Value) and value.best else shown

    right = [any(isinstance(row[i], Value) for row in table.rows) for i in range(len(table.header))]
    lines = [
        f"### {_escape_markdown(table.title)}",
        "",
        "| " + " | ".join(map(_escape_markdown, table.header)) + " |",
        "|" + "|".join("---:" if number else "---" for number in right) + "|",
        *("| " + " | ".join(map(cell, row)) + " |" for row in table.rows),
        "",
        *(f"{note}  " for note in table.notes),
    ]
    return "\n".join(lines) + "\n"


def _escape_markdown(text: str) -> str:
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_{}<>\[\]|#~])", r"\\\1", flat).replace("&", "&amp;")


def to_csv(table: Table) -> str:
    """Every number as four columns: mean, low and high end of its interval, and whether it is the best."""
    numbers = [any(isinstance(row[i], Value) for row in table.rows) for i in range(len(table.header))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts = ("", " low", " high", " best")
    header: list[str] = []
    for name, is_number in zip(table.header, numbers, strict=True):
        header += [f"{name}{part}" for part in (parts if is_number else parts[:1])]
    writer.writerow(header)
    for row in table.rows:
        cells: list[str] = []
        for value, is_number in zip(row, numbers, strict=True):
            if not is_number:
                cells.append(text_of(value))
            elif isinstance(value, Value):
                low, high = value.estimate.interval or (None, None)
                ends = ["" if end is None else f"{end:.4f}" for end in (low, high)]
                cells += [f"{value.estimate.mean:.4f}", *ends, "yes" if value.best else ""]
            else:
                cells += [text_of(value), "", "", ""]
        writer.writerow(cells)
    return out.getvalue()


def to_latex(table: Table) -> str:
    """A floating table with booktabs' rules (\\usepackage{booktabs})."""

    def cell(value: str | Value | None) -> str:
        shown = text_of(value, plus_minus="\0")
        shown = _escape_latex(shown).replace("\0", r"$\pm$").replace("†", r"$^\dagger$")
        return rf"\textbf{{{shown}}}" if isinstance(value, Value) and value.best else shown

    right = [any(isinstance(row[i], Value) for row in table.rows) for i in range(len(table.header))]
    notes = " ".join(_escape_latex(note).replace("†", r"$^\dagger$") for note in table.notes)
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escape_latex(table.title)}. {notes}}}",
        rf"\begin{{tabular}}{{{''.join('r' if number else 'l' for number in right)}}}",
        r"\toprule",
        " & ".join(map(_escape_latex, table.header)) + r" \\",
        r"\midrule",
        *(" & ".join(map(cell, row)) + r" \\" for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split(" ")) if sign.isprintable() or sign == "\0")


def write_tables(tables: Sequence[Table], folder: Path) -> list[Path]:
    """Each table as .csv and .tex of its name, and all in tables.md."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    taken: set[str] = set()
    for table in tables:
        name = file_name(table.name, taken)
        for ending, text in (("csv", to_csv(table)), ("tex", to_latex(table))):
            path = folder / f"{name}.{ending}"
            path.write_text(text, encoding="utf-8")
            written.append(path)
    path = folder / "tables.md"
    path.write_text("\n".join(map(to_markdown, tables)), encoding="utf-8")
    return [path, *written]


def file_name(name: str, taken: set[str]) -> str:
    """A file's name without its ending that any file system takes, not among those ``taken``, to which it is added."""
    bare = re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("._")[:80] or "table"
    found, number = bare, 2
    while found.lower() in taken:
        found, number = f"{bare}_{number}", number + 1
    taken.add(found.lower())
    return found


def write_summary(summary: Summary, path: Path) -> None:
    """A row per model, data set, metric and number of images; `scaletransfer report` reads it again."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(SUMMARY_COLUMNS)
        for cell in summary.cells:
            for row in cell.rows:
                writer.writerow(_summary_row(row.entry, row.best))


def _summary_row(entry: Entry, best: bool) -> list[object]:
    e = entry.estimate
    count = len(e.seeds)
    biased = None if e.std is None else e.std * ((count - 1) / count) ** 0.5
    low, high = e.interval or (None, None)
    numbers = ["" if value is None else f"{value:.6g}" for value in (e.mean, e.std, biased, e.least, e.most, low, high)]
    mean, std, std0, least, most, below, above = numbers
    metric = entry.metric if lower_is_better(entry.metric) else published_metric(entry.metric).replace("/", "_")
    return [
        *(entry.dataset, metric, bool(entry.main), entry.network, entry.pretraining, shot_name(entry.shot), count),
        *(mean, std, std0, least, most, " ".join(map(str, e.seeds)), " ".join(map(str, entry.last_steps))),
        *(below, above, e.kind, best, entry.source),
    ]

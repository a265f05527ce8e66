"""`scaletransfer report RESULTS ... [--compare paper] [--out DIR]`: what fine-tuning runs found, side by side.

RESULTS are tables of results (the paper's released CSV files, a sweep's results.csv, means over seeds), run folders, or
folders that hold some; the word paper is the paper's own table. Prints a table per target and number of training
images: each model's mean over seeds, and its gain over the baseline, paired by seed. With --out, DIR gets the same as
one page (index.html), tables (Markdown, CSV, LaTeX) and figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from scaletransfer.cli import CommandParser
from scaletransfer.files import lack_of_space_named
from scaletransfer.report_curves import curves_of
from scaletransfer.report_inputs import Inputs, read_inputs
from scaletransfer.report_page import MARK, write_page
from scaletransfer.report_tables import comparison, interval_notes, tables_of, write_summary, write_tables
from scaletransfer.result_names import metric_title, title
from scaletransfer.result_table import write_scores
from scaletransfer.results import BASELINE, RESULT, Estimate, shot_words
from scaletransfer.summary import Row, Summary, is_baseline, summarise

__all__ = ["text", "write_report", "main"]

LONG = 60
"""Rows up to which the command prints them; more stand in the files alone, where there are files."""


def text(summary: Summary) -> str:
    """The main metric of every target as plain text, a block per cell."""
    blocks, shown = [], []
    for cells in summary.by_dataset().values():
        for cell in cells:
            shown += [row.score for row in cell.rows]
            lines = [_head(summary), *(_line(summary, row) for row in cell.rows)]
            block = "\n".join(_aligned(lines))
            blocks.append(f"{title(cell.dataset)}, {shot_words(cell.shot)}: {metric_title(cell.metric)}\n{block}")
    notes = interval_notes(shown)
    if any(row.best for cell in summary.cells for row in cell.rows):
        notes.append("best: clear of the intervals of all others.")
    if summary.baseline is not None:
        base = title(summary.baseline)
        notes.append(f"Gains: percentage points over {base}, paired by seed; * excludes zero (each by itself).")
    shown_text = "\n\n".join([*blocks, "\n".join(notes)]) + "\n"
    # a name from a table may hold what a terminal would obey
    return "".join(sign if sign.isprintable() or sign == "\n" else "?" for sign in shown_text)


def _head(summary: Summary) -> list[str]:
    head = ["model", "seeds", "mean", "95 % interval", ""]
    return head + (
        [] if summary.baseline is None else [f"gain over {title(summary.baseline)}", "95 % interval", "pairs"]
    )


def _line(summary: Summary, row: Row) -> list[str]:
    line = [row.title, str(len(row.score.seeds)), f"{row.score.mean:.2f}", _range(row.score, "")]
    line.append("best" if row.best else "")
    if row.gain is not None:
        mark = " *" if row.gain.excludes_zero else ""
        line += [f"{row.gain.mean:+.2f}", _range(row.gain, "+") + mark, str(len(row.gain.seeds))]
    elif summary.baseline is not None:
        line += ["baseline" if is_baseline(row.entry, summary.baseline) else "no pair", "", ""]
    return line


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    columns = [column for column in zip(*lines, strict=True) if any(column)]
    left = {column[0] for column in columns} & {"model", "95 % interval", ""}
    shown = []
    for column in columns:
        width = max(map(len, column))
        shown.append([word.ljust(width) if column[0] in left else word.rjust(width) for word in column])
    return ["  " + "  ".join(words).rstrip() for words in zip(*shown, strict=True)]


def _range(estimate: Estimate, sign: str) -> str:
    if estimate.interval is None:
        return "none (one seed)"
    low, high = estimate.interval
    return f"{low:{sign}.2f} to {high:{sign}.2f}" + (" †" if estimate.kind == "bootstrap" else "")


def write_report(summary: Summary, inputs: Inputs, folder: Path, named: Sequence[str]) -> list[str]:
    """Write page, tables and figures into ``folder``; remarks on what could not be.

    named: what was given, for the page's head.

    Raises:
        ValueError: more than fits into one page.
    """
    written = [folder / name for name in ("results.csv", "summary.csv")]
    for table in inputs.tables:
        if table.resolve() in [path.resolve() for path in written]:
            raise ValueError(f"--out {folder} would overwrite {table}, which this report is of: name another folder")
    _clear(folder)
    curves = curves_of(inputs.entries)
    tables = tables_of(summary)
    sources = sorted({model[2] for model in summary.models if model[2]})
    notes = []
    for source in sources:
        beside = comparison(summary, source)
        if beside is None:
            notes.append(f"no model here is in {source} with the same target, metric and number of images")
        else:
            tables.append(beside)
    write_tables(tables, folder / "tables")
    write_summary(summary, folder / "summary.csv")
    if inputs.scores:
        write_scores(inputs.scores, folder / "results.csv")
    notes += write_page(summary, curves, tables, folder / "index.html", named, len(inputs.unfinished))
    try:
        from scaletransfer.report_figure import write_figures

        write_figures(summary, curves, folder / "figures")
    except ValueError as error:  # the rest needs no matplotlib
        notes.append(f"no figures/: {error}")
    return notes


def _clear(folder: Path) -> None:
    """Make the folder; what an earlier report left in it, of targets that are no longer there perhaps, goes."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "index.html"
    if not page.is_file() or MARK not in page.read_text(encoding="utf-8", errors="replace")[:2000]:
        return
    for name, endings in (("tables", (".csv", ".tex", ".md")), ("figures", (".png", ".pdf"))):
        for path in (folder / name).glob("*"):
            if path.suffix in endings:
                path.unlink()
    (folder / "results.csv").unlink(missing_ok=True)


def _folder(value: str) -> Path:
    if Path(value).suffix.lower() in (".png", ".svg", ".pdf", ".html", ".csv", ".md", ".tex"):
        raise argparse.ArgumentTypeError(f"{value} is a file's name; name a folder: page, tables and figures go there")
    return Path(value)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises ValueError for what a person can mend."""
    parser = CommandParser(prog="scaletransfer report", description=__doc__)
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="tables (.csv), run folders, sweeps; or: paper")
    parser.add_argument("--compare", metavar="paper|TABLE", help="show these results beside: paper, or another table")
    parser.add_argument("--baseline", help=f"model that gains are over (default: {BASELINE}, if there are runs of it)")
    parser.add_argument("--out", type=_folder, metavar="DIR", help="write index.html, tables/, figures/ and CSVs there")
    options = parser.parse_args(argv)
    inputs = read_inputs(options.results, options.compare)
    baseline = options.baseline
    if baseline is None and any(is_baseline(entry, BASELINE) for entry in inputs.entries):
        baseline = BASELINE
    summary = summarise(inputs.entries, baseline)
    notes = list(inputs.notes)
    rows = sum(len(cell.rows) for cell in summary.cells if cell.main)
    if options.out is not None:
        with lack_of_space_named(options.out):
            notes += write_report(summary, inputs, options.out, options.results)
    if options.out is None or rows <= LONG:
        print(text(summary), end="")
    if options.out is not None:
        print(f"{rows} means in {options.out}: open index.html; tables/, figures/, summary.csv")
    if inputs.unfinished:
        print(f"left out, as they have no {RESULT} (yet): {', '.join(inputs.unfinished)}", file=sys.stderr)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    from scaletransfer.cli import run_command

    sys.exit(run_command(main))

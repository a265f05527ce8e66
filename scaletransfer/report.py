"""`scaletransfer report FOLDER ... [--csv results.csv] [--out report.png]`: what fine-tuning runs found, side by side.

Prints a table per data set and number of training images: each pre-trained model's mean over seeds, and its gain over
the baseline, paired by seed.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from scaletransfer.cli import CommandParser
from scaletransfer.results import (
    BASELINE,
    RESULT,
    Estimate,
    Result,
    Summary,
    collect,
    metric_words,
    shot_words,
    summarise,
)

__all__ = ["collect", "summarise", "table", "write_csv", "draw", "main"]

COLUMNS = ("metric_value", "metric", "path", "seed", "shot", "pretrained_model", "dataset", "last_step")
# What the published tables call the metrics; both are in percent there, and so in all that we print.
PUBLISHED = {"accuracy": "test_acc", "mean_auroc": "test_mean_auc"}


def table(summary: Summary) -> str:
    """The summary as plain text, a block per cell."""
    blocks, base = [], summary.baseline
    for cell in summary.cells:
        head = ["model", "seeds", "mean", "95 % interval"]
        if base is not None:
            head += [f"gain over {base}", "95 % interval", "pairs"]
        lines = [head]
        for row in cell.rows:
            line = [row.model, str(len(row.score.seeds)), f"{row.score.mean:.2f}", _range(row.score, "")]
            if row.gain is not None:
                mark = " *" if row.gain.excludes_zero else ""
                line += [f"{row.gain.mean:+.2f}", _range(row.gain, "+") + mark, str(len(row.gain.seeds))]
            elif base is not None:
                line += ["baseline" if row.model == base else "no pair", "", ""]
            lines.append(line)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        one = cell.sample
        left = (0, 3, 5)
        blocks.append(
            f"{cell.dataset}, {shot_words(cell.shot)}: {metric_words(one.metric)}; {one.valid_samples} validation "
            f"images, {one.steps} steps, protocol {one.protocol}\n"
            + "\n".join(
                "  "
                + "  ".join(
                    text.ljust(width) if index in left else text.rjust(width)
                    for index, (text, width) in enumerate(zip(line, widths, strict=True))
                ).rstrip()
                for line in lines
            )
        )
    notes = "Intervals: Student's t over seeds; one seed has none."
    if base is not None:
        notes += f" Gains: percentage points over {base}, paired by seed; * excludes zero (each by itself)."
    return "\n\n".join([*blocks, notes]) + "\n"


def _range(estimate: Estimate, sign: str) -> str:
    if estimate.interval is None:
        return "none (one seed)"
    low, high = estimate.interval
    return f"{low:{sign}.2f} to {high:{sign}.2f}"


def write_csv(results: Sequence[Result], path: Path) -> None:
    """The published tables' columns: a row per run and metric, values in percent, shots as "5_shot", "full_shot"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for r in results:
            shot = "full_shot" if r.shot is None else f"{r.shot}_shot"
            for name, published in PUBLISHED.items():
                if isinstance(value := r.metrics.get(name), (int, float)):
                    shown = round(100 * value, 6)
                    writer.writerow(
                        [shown, published, r.folder, r.seed, shot, r.pretrained_model, r.dataset, r.last_step]
                    )


def draw(summary: Summary, path: Path | str) -> None:
    """Draw the summary, 1600 x 900 pixels for up to three data sets; the name's ending decides the format.

    Raises:
        ValueError: matplotlib is not installed, or writes no such format.
    """
    from scaletransfer.report_figure import figure

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure(summary).savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises ValueError for what a person can mend."""
    parser = CommandParser(prog="scaletransfer report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN_OR_FOLDER", help="run folders, or folders that hold some")
    parser.add_argument("--baseline", help=f"model that gains are over (default: {BASELINE}, if there are runs of it)")
    parser.add_argument("--csv", type=Path, help="write a row per run and metric here, in the published columns")
    parser.add_argument("--out", type=Path, help="draw curves and scores here, a .png, .svg or .pdf")
    options = parser.parse_args(argv)
    results = collect(options.runs)
    baseline = options.baseline
    if baseline is None and any(result.pretrained_model == BASELINE for result in results):
        baseline = BASELINE
    summary = summarise(results, baseline)
    if options.out is not None:
        draw(summary, options.out)
    if options.csv is not None:
        write_csv(results, options.csv)
    print(table(summary), end="")
    if unfinished := _unfinished(options.runs):
        print(f"left out, as they have no {RESULT} yet: {', '.join(unfinished)}", file=sys.stderr)
    return 0


def _unfinished(paths: Iterable[str]) -> list[str]:
    """Folders of fine-tuning runs that have chosen their images and not ended."""
    return sorted(
        {
            folder
            for path in paths
            for folder, _, names in os.walk(path)
            if "selection.json" in names and RESULT not in names
        }
    )


if __name__ == "__main__":
    from scaletransfer.cli import run_command

    sys.exit(run_command(main))

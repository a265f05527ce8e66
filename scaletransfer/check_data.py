"""`scaletransfer check-data SHARDS... [--targets SHARDS...]`: look at data before anyone trains on it.

Tables of images, patients and labels; patients and images that are in two splits; pixels that look wrong; a contact
sheet of each set.  Text on the screen and in OUT/report.txt, tables as CSV, images named by their keys alone.  The exit
status is 1 if two splits share what they must not, or an image cannot be read.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from scaletransfer import data_tables, duplicates
from scaletransfer.checked_sets import CheckedSet, Group, open_sets, relation
from scaletransfer.cli import CommandParser
from scaletransfer.contact_sheet import write_sheet
from scaletransfer.data_tables import LabelCount, SharedPatients, label_counts, shared_patients
from scaletransfer.duplicates import KINDS, Doubles, find_doubles
from scaletransfer.files import write_atomically
from scaletransfer.image_features import cached_features
from scaletransfer.pixel_check import PixelReport, check_pixels

REPORT = "report.txt"
MANY_LABELS = 30
"""Labels of a set up to which the report shows each."""
_SHOWN = 5


@dataclass(slots=True, kw_only=True)
class Check:
    """What was found, and the text that says it."""

    sets: list[CheckedSet]
    groups: list[Group]
    labels: list[list[LabelCount]]
    """Of each group."""
    patients: SharedPatients
    doubles: Doubles
    pixels: list[PixelReport]
    """Of each set."""
    sample: int = 0
    """Images of a split that were looked at, at most; 0: all."""
    refusals: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def groups_of(self, its: CheckedSet) -> list[tuple[int, Group]]:
        """Numbers and groups of a set."""
        return [(number, group) for number, group in enumerate(self.groups) if group.set is its]

    def flags(self, its: CheckedSet) -> dict[tuple[int, int], str]:
        """(number of the group among those of the set, position) -> what is wrong with that image."""
        pixels = self.pixels[self.sets.index(its)]
        local = {number: place for place, (number, _) in enumerate(self.groups_of(its))}
        found = {(group, place): word for group, words in pixels.flags.items() for place, word in words.items()}
        for (one, two), pairs in self.doubles.between.items():
            if relation(self.groups[one], self.groups[two]) != "refused":
                continue
            for pair in pairs:
                for (group, place), other in ((pair.first, two), (pair.second, one)):
                    if group in local and (local[group], place) not in found:
                        found[local[group], place] = f"also in {self.groups[other].name}"
        return found


def check_data(
    shards: Sequence[str | os.PathLike[str]],
    targets: Sequence[str | os.PathLike[str]] = (),
    *,
    cache: str | os.PathLike[str],
    workers: int = 1,
    max_images: int | None = None,
    seed: int = 0,
    strict: bool = False,
) -> Check:
    """Check folders of shards: `shards` to pre-train on, `targets` to fine-tune and test on.

    cache: a folder that keeps what was computed of each image, so that the next call is quick.  max_images: of each
    split only so many, drawn with `seed`.  strict: what could not be compared is refused as well.

    Raises ValueError for a folder that is no finished folder of shards, or is damaged, and options out of range.
    """
    for name, value, least in (("--workers", workers, 1), ("--max-images", max_images, 1), ("--seed", seed, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    sets = open_sets(shards, targets)
    groups = _read(sets, Path(cache), workers, max_images, seed)
    check = Check(
        sets=sets,
        groups=groups,
        labels=[label_counts(group) for group in groups],
        patients=shared_patients(groups),
        doubles=find_doubles(groups),
        pixels=[check_pixels([group for group in groups if group.set is its]) for its in sets],
        sample=max_images or 0,
    )
    _judge(check, strict)
    return check


def _read(sets: Sequence[CheckedSet], cache: Path, workers: int, most: int | None, seed: int) -> list[Group]:
    """Every split of every set with the features of its images, read or from the cache."""
    chosen = []
    for its in sets:
        for split, info in its.index.splits.items():
            rows = np.arange(info.samples, dtype=np.int64)
            if most is not None and most < len(rows):
                rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
                rows = np.sort(rng.choice(rows, most, replace=False))
            chosen.append((its, split, rows))
    total = sum(len(rows) for *_, rows in chosen)
    groups = []
    # disable=None: no bar where nobody looks (a log file)
    with tqdm(total=total, unit="img", desc="reading images", disable=None) as bar:
        for its, split, rows in chosen:
            features = cached_features(its.index, split, rows, cache, workers=workers, progress=bar.update)
            groups.append(Group(set=its, split=split, rows=rows, features=features))
    return groups


def _judge(check: Check, strict: bool) -> None:
    """Fill refusals and warnings."""
    for (one, two), people in sorted(check.patients.between.items()):
        first, second = check.groups[one], check.groups[two]
        text = f"{_many(len(people), 'patient')} in {first.name} and in {second.name}"
        (check.refusals if relation(first, second) == "refused" else check.warnings).append(text)
    for first, second, pairs in check.doubles.all(check.groups):
        kinds = Counter(pair.kind for pair in pairs)
        parts = ", ".join(f"{kinds[kind]:,} {kind}" for kind in KINDS if kinds[kind])
        count = min(len({pair.first for pair in pairs}), len({pair.second for pair in pairs}))
        text = f"{_many(count, 'image')} in {first.name} and in {second.name} ({parts})"
        (check.refusals if relation(first, second) == "refused" else check.warnings).append(text)
    for number, group in enumerate(check.groups):
        inside = check.doubles.inside.get(number, Counter())
        if inside.total():
            check.warnings.append(
                f"{group.name}: {inside['bytes'] + inside['pixels']:,} surplus copies and {inside['alike']:,} pairs of "
                "pictures that look the same inside the split"
            )
        silent = [its.label for its in check.labels[number] if not its.positive and not its.negative]
        absent = [its.label for its in check.labels[number] if not its.positive and its.label not in silent]
        for names, what in ((silent, "labels not known of any image"), (absent, "labels without a positive")):
            if names:
                shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
                check.warnings.append(f"{group.name}: {what}: {shown}")
        if group.set.index.splits[group.split].quarantine:
            left = len(group.set.index.splits[group.split].quarantine)
            check.warnings.append(f"{group.name}: {_many(left, 'image')} left out when the shards were made")
    for its, pixels in zip(check.sets, check.pixels, strict=True):
        if pixels.summary["unreadable"]:
            check.refusals.append(f"{_many(pixels.summary['unreadable'], 'image')} of {its.name} cannot be read")
        words = [
            f"{pixels.summary[kind]:,} {kind}" for kind in ("empty", "crushed", "inverted") if pixels.summary.get(kind)
        ]
        if words:
            check.warnings.append(f"{its.name}: {', '.join(words)} of {pixels.summary['images']:,} images")
        check.warnings += pixels.notes
    if check.doubles.crowded:
        check.warnings.append(
            f"{check.doubles.crowded:,} pictures look like more than a thousand others each, of which only the nearest "
            "were compared"
        )
    (check.refusals if strict else check.warnings).extend(check.patients.not_compared)


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def report(check: Check) -> str:
    """The whole report, the verdict in its last line."""
    total = sum(len(group.rows) for group in check.groups)
    lines = [f"check-data: {_many(len(check.sets), 'set')}, {total:,} images"]
    if check.sample:
        lines.append(
            f"A SAMPLE: at most {check.sample:,} images of each split were looked at; images and patients that are "
            "shared can be missed. Counts of labels are of all images."
        )
    for its, pixels in zip(check.sets, check.pixels, strict=True):
        lines += ["", *_set_lines(check, its, pixels)]
    lines += ["", *_found("refused", check.refusals), *_found("warnings", check.warnings), ""]
    more = f"; {_many(len(check.warnings), 'warning')}" if check.warnings else ""
    if check.refusals:
        lines.append(f"verdict: REFUSED, {_many(len(check.refusals), 'finding')}{more}")
    else:
        sampled = " in the sample" if check.sample else ""
        lines.append(f"verdict: nothing is shared that must not be{sampled}{more}")
    return "\n".join(lines) + "\n"


def _found(title: str, sentences: Sequence[str]) -> list[str]:
    return [f"{title}:", *(f"  {sentence}" for sentence in sentences)] if sentences else [f"{title}: none"]


def _set_lines(check: Check, its: CheckedSet, pixels: PixelReport) -> list[str]:
    index, summary = its.index, pixels.summary
    lines = [f"{its.name}: {index.source}, {_role(its)}, {index.task}, {len(index.label_names)} labels"]
    rows = [("split", "images", "patients", "left out", "views")]
    for _, group in check.groups_of(its):
        info = index.splits[group.split]
        rows.append(
            (group.split, f"{info.samples:,}", f"{info.patients:,}", f"{len(info.quarantine):,}", _views(group) or "-")
        )
    lines += _aligned(rows)
    for number, group in check.groups_of(its):
        counts = check.labels[number]
        shown = counts
        if len(counts) > MANY_LABELS:
            ordered = sorted(counts, key=lambda count: -count.positive)
            shown = ordered[:_SHOWN] + ordered[-_SHOWN:]
        columns = data_tables.STATES if index.task == "multilabel" else ("images",)
        cells = [(count.label, *(f"{n:,}" for n in count.counts[: len(columns)])) for count in shown]
        lines += ["", *_aligned([(f"{group.split}:", *columns), *cells])]
        if len(shown) < len(counts):
            lines.append(f"  the {_SHOWN} largest and smallest of {len(counts):,} labels; all are in labels.csv")
    if "mean" in summary:
        lines += [
            "",
            f"  pixels: mean {summary['mean']}, std {summary['std']} (white is 1)",
            f"  the middle image: {summary['width p50']:,} x {summary['height p50']:,} pixels, percentiles 1 and 99 at "
            f"{summary['low p50']:.3f} and {summary['high p50']:.3f}, {summary['levels p50']:,} grey values",
        ]
    return lines


def _views(group: Group) -> str:
    names = [*group.set.index.views, ""]
    counts = Counter(group.table["view"].tolist())
    return ", ".join(f"{names[view]} {number:,}" for view, number in sorted(counts.items()) if view >= 0)


def _role(its: CheckedSet) -> str:
    return " and ".join(word for word, yes in (("pre-training", its.trains), ("target", its.target)) if yes)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table as text: the first column to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        numbers = "  ".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append(f"  {row[0].ljust(widths[0])}  {numbers}".rstrip())
    return lines


def write_tables(check: Check, out: Path) -> None:
    """images.csv, labels.csv, patients.csv, duplicates.csv, pixel_summary.csv, pixels.csv in the folder `out`."""
    images, labels, flagged = [], [], []
    for number, group in enumerate(check.groups):
        info = group.set.index.splits[group.split]
        names = (group.set.name, group.split)
        images.append(
            (
                *names,
                _role(group.set),
                info.samples,
                len(group.rows),
                info.patients,
                len(info.quarantine),
                _views(group),
            )
        )
        labels += [(*names, count.label, *count.counts) for count in check.labels[number]]
    for its, pixels in zip(check.sets, check.pixels, strict=True):
        for place, (_, group) in enumerate(check.groups_of(its)):
            positions = sorted(pixels.flags[place])
            words = [pixels.flags[place][position] for position in positions]
            flagged += [(its.name, group.split, *row) for row in zip(group.keys(positions), words, strict=True)]
    _write_csv(
        out / "images.csv",
        ("set", "split", "role", "images", "looked_at", "patients", "left_out", "views"),
        images,
    )
    _write_csv(out / "labels.csv", ("set", "split", "label", *data_tables.STATES), labels)
    _write_csv(
        out / "patients.csv",
        ("patient", "relation", "set", "split", "key"),
        data_tables.listed(check.groups, check.patients),
    )
    ends = [f"{name}_{end}" for end in "ab" for name in ("set", "split", "key")]
    _write_csv(
        out / "duplicates.csv",
        ("relation", "kind", "likeness", *ends),
        duplicates.listed(check.groups, check.doubles),
    )
    columns = list(dict.fromkeys(name for pixels in check.pixels for name in pixels.summary))
    rows = [[pixels.summary.get(name, "") for name in columns] for pixels in check.pixels]
    _write_csv(out / "pixel_summary.csv", columns, rows)
    _write_csv(out / "pixels.csv", ("set", "split", "key", "problem"), flagged)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def main(argv: Sequence[str]) -> int:
    """The command; 0 if nothing is refused, else 1.  Raises ValueError for what a person can mend."""
    options = _parser().parse_args(argv)
    out: Path = options.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    start = time.monotonic()
    check = check_data(
        options.shards,
        options.targets,
        cache=out / "cache",
        workers=options.workers,
        max_images=options.max_images,
        seed=options.seed,
        strict=options.strict,
    )
    write_tables(check, out)
    sheets = []
    for its in check.sets:
        sheets.append(f"contact-{its.name}.png")
        groups = [group for _, group in check.groups_of(its)]
        title = f"{its.name}: {sum(len(group.table) for group in groups):,} images; flagged ones first, in red"
        write_sheet(out / sheets[-1], groups, check.flags(its), title=title, seed=options.seed)
    text = report(check)
    write_atomically(out / REPORT, text.encode("utf-8"))
    seconds = time.monotonic() - start
    number = sum(len(group.rows) for group in check.groups)
    print(f"{out}: {REPORT}, images.csv, labels.csv, patients.csv, duplicates.csv, pixels.csv, {', '.join(sheets)}")
    print(f"{number:,} images in {seconds:.1f} s ({number / seconds:,.0f} images/s)\n")
    print(text, end="")
    return 1 if check.refusals else 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="scaletransfer check-data",
        description="Look at shards before training: what they hold, what two splits share, what looks wrong.",
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add = parser.add_argument
    add("shards", nargs="+", metavar="SHARDS", help="folders of shards to pre-train on")
    add("--targets", nargs="+", default=[], metavar="SHARDS", help="folders to fine-tune and test on")
    add(
        "--out", type=Path, default=Path("check-data"), metavar="DIR", help="folder of the report (default: check-data)"
    )
    add("--workers", type=int, default=min(8, cores), metavar="N", help="processes (default: one a core, at most 8)")
    add("--max-images", type=int, metavar="N", help="look at N images of each split only")
    add("--seed", type=int, default=0, metavar="S", help="of samples and contact sheets (default: 0)")
    add("--strict", action="store_true", help="refuse, too, if patients of two sets cannot be compared")
    return parser


if __name__ == "__main__":
    from scaletransfer.cli import run_command

    raise SystemExit(run_command(main))

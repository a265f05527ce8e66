"""`make_shards SOURCE --root R --out DIR`: a data set as its publisher lays it out -> a folder of shards.

With `--list FILE.csv` it writes the table of what would be sharded, and stops.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scaletransfer import keys
from scaletransfer.cli import CommandParser
from scaletransfer.listing import LABEL_MODES, write_listing
from scaletransfer.mirrors import open_mirror
from scaletransfer.pixel_range import WHITE16
from scaletransfer.shard_build import check_workers
from scaletransfer.shard_output import Output, Part, parse_part
from scaletransfer.shard_parts import PartReport, build_part, merge, shards_of
from scaletransfer.shard_plan import FirstRecords, check_images
from scaletransfer.shard_range import measure_plan
from scaletransfer.shard_remote import open_output
from scaletransfer.shards import BuildReport, Encoding, Plan, build, describe, plan_shards
from scaletransfer.sources import SOURCES, named_values, open_source, source_class, source_options
from scaletransfer.storage import is_url, local_path
from scaletransfer.storage_errors import shown

FINISHED = "these shards were finished already by the same command; nothing to do"


def main(argv: Sequence[str]) -> int:
    """Run the command; 0 if shards or listing are there.  Raises ValueError for what the user can mend."""
    options = _parser().parse_args(argv)
    _check_jobs(options)
    source_settings = _source_settings(options)
    source: Any = open_source(options.source, _root(options.root), **source_settings)
    salt = keys.PUBLIC_SALT if source.public and not options.salt_file else keys.load_salt(options.salt_file)
    recorded = _recorded(options.source, source, source_settings)
    if options.limit is not None:
        source = FirstRecords(source, options.limit)
        recorded["limit"] = options.limit
    if options.list:
        return _list(source, salt, options)
    if options.labels is not None:
        raise ValueError("--labels chooses the label columns of --list; shards always keep the raw labels")
    encoding = Encoding(
        size=options.size,
        encode=options.encode,
        quality=options.quality,
        bit_depth=0 if options.bit_depth == "keep" else int(options.bit_depth),
        pixel_max=_pixel_max(options),
    )
    plan = plan_shards(
        source,
        salt,
        seed=options.seed,
        shard_size=options.shard_size,
        encoding=encoding,
        allow_missing=options.allow_missing,
        options=recorded,
    )
    _say(source)
    if options.measure:
        return _measure(plan, options)
    return _build(plan, options)


def _build(plan: Plan, options: argparse.Namespace) -> int:
    """Shards, a part of them, or the merge of parts."""
    out = open_output(options.out or Path("shards") / plan.source, options.staging)
    part = parse_part(options.part) if options.part else None
    files = None if part is None else shards_of(plan, part.of)[part.number]
    total = sum(end - start for _, file, start, end in plan.shards() if files is None or file in files)
    # disable=None: no bar where nobody looks (a log file); counts per shard if several processes work
    measures = plan.encoding.bit_depth == 8 and not plan.encoding.pixel_max and part is None
    what = f"part {part}" if part else "merge" if options.merge else options.source
    with (
        tqdm(total=total, unit="img", desc="range of 16-bit images", disable=None if measures else True) as looked_at,
        tqdm(total=total, unit="img", desc=f"{what} -> {out}", disable=None) as bar,
    ):
        if part:
            _print_part(out, part, build_part(plan, out, part, workers=options.workers, progress=bar.update))
            return 0
        if options.merge:
            report = merge(plan, out, workers=options.workers, progress=bar.update)
        else:
            report = build(
                plan,
                out,
                workers=options.workers,
                overwrite=options.overwrite,
                progress=bar.update,
                measured=looked_at.update,
            )
    _print_report(out, report, merged=options.merge)
    return 0


def _root(place: str) -> Path:
    """The folder of the data set; of one behind a URL, its mirror."""
    if not is_url(place):
        return Path(place)
    local = local_path(place)
    if local is not None:
        return Path(local)
    mirror = open_mirror(place)
    copied = f", {mirror.copied:,} bytes of them now" if mirror.copied else ""
    print(
        f"note: {shown(place)}: {mirror.images:,} images stay there; {mirror.files:,} other files are copied to "
        f"{mirror.folder}{copied}",
        file=sys.stderr,
    )
    return mirror.folder


def _measure(plan: Plan, options: argparse.Namespace) -> int:
    """Print the --pixel-max that a build without one would find."""
    total = sum(len(samples) for samples in plan.samples.values())
    check_workers(options.workers)
    with tqdm(total=total, unit="img", desc="range of 16-bit images", disable=None) as looked_at:
        white = measure_plan(plan, options.workers, looked_at.update)
    if white:
        print(f"--pixel-max {white}")
    else:
        print(f"--pixel-max {WHITE16}")
        print("note: no image of 16 bits leaves its white open, so any value gives the same images", file=sys.stderr)
    return 0


def _check_jobs(options: argparse.Namespace) -> None:
    """ValueError for options that contradict each other."""
    chosen = [name for name in ("list", "part", "merge", "measure") if getattr(options, name)]
    if len(chosen) > 1:
        raise ValueError(f"--{chosen[0]} and --{chosen[1]} are different things to do; give one of them")
    if options.overwrite and chosen and chosen != ["list"]:
        raise ValueError(
            f"--overwrite with --{chosen[0]} would remove what other parts have written; remove the folder before the "
            "first part instead"
        )
    if options.measure and (options.bit_depth != "8" or options.pixel_max):
        raise ValueError("--measure finds --pixel-max for --bit-depth 8: give it with --bit-depth 8 and no --pixel-max")
    if options.part:
        parse_part(options.part)


def _pixel_max(options: argparse.Namespace) -> int:
    """0 where it was not given."""
    if options.pixel_max is None:
        return 0
    if options.pixel_max < 1:
        raise ValueError(f"--pixel-max is {options.pixel_max}; give the value of white, from 1 to 65535")
    return int(options.pixel_max)


def _list(source: Any, salt: bytes, options: argparse.Namespace) -> int:
    if options.check_images:
        check_images(source, source.locate(list(source)), allow_missing=options.allow_missing)
    summary: dict[str, Any] = write_listing(source, options.list, options.labels or "corrected", salt)
    _say(source)
    print(f"{options.list}: {summary['rows']:,} rows")
    for split, rows in summary["splits"].items():
        patients = summary["patients"][split]
        print(f"  {split:6} {rows:,} rows" + (f", {patients:,} patients" if patients else ""))
    for name, counts in summary["labels"].items():
        shown = ", ".join(f"{n:,} {state}" for state, n in counts.items()) if isinstance(counts, dict) else counts
        print(f"  {name}: {shown}")
    return 0


def _say(source: Any) -> None:
    """What the source has to say about its rows, on standard error."""
    for note in source.notes:
        print(f"note: {note}", file=sys.stderr)
    for reason, rows in source.left_out.items():
        print(f"left out: {rows:,} rows, {reason}", file=sys.stderr)


def _print_report(out: Output, report: BuildReport, *, merged: bool) -> None:
    print(f"{out}: {describe(report.index)}")
    if merged and report.kept_shards:
        print(f"{report.kept_shards} shards merged in {report.seconds:.1f} s")
        return
    if not report.images and not report.kept_shards:
        print(FINISHED)
        return
    rate = report.images / report.seconds if report.seconds else 0.0
    kept = f", {report.kept_shards} shards kept from an interrupted run" if report.kept_shards else ""
    print(f"{report.images:,} images in {report.seconds:.1f} s ({rate:,.0f} images/s){kept}")


def _print_part(out: Output, part: Part, report: PartReport) -> None:
    if report.finished:
        print(f"{out}: {FINISHED}")
        return
    rate = report.images / report.seconds if report.seconds else 0.0
    kept = f", {report.kept_shards} of them kept from an interrupted run" if report.kept_shards else ""
    print(
        f"{out}: part {part}, {report.shards} shards{kept}; {report.images:,} images in {report.seconds:.1f} s "
        f"({rate:,.0f} images/s); when all parts are there, run the same command with --merge instead of --part"
    )


def _source_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Options for `open_source`: what the user gave and, of the general ones, what the source has."""
    settings = named_values(options.option)
    if options.views is not None:
        settings["views"] = options.views  # a source without views refuses the option by name
    if "protocol" in source_options(options.source):
        settings["protocol"] = options.protocol
    elif options.protocol == "paper":
        print(f"note: {options.source} has the same rows and splits under both protocols", file=sys.stderr)
    return settings


def _recorded(chosen: str, source: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Source options that go into the index, those left at their default as well; no paths, views in canonical form."""
    recorded: dict[str, Any] = {}
    for name in source_options(chosen):
        value = getattr(source, name, settings.get(name))
        # text that the source doesn't keep as its own may be a path
        if isinstance(value, (bool, int, float)) or (isinstance(value, str) and hasattr(source, name)):
            recorded["split_seed" if name == "seed" else name] = value  # `seed` is that of the shuffle
    if hasattr(source, "views"):
        recorded["views"] = ["all"] if source.views is None else sorted(source.views)
    return recorded


def _source_help() -> str:
    """Which source has which options, for the end of --help."""
    lines = ["options of the sources, by --option NAME=VALUE (folders, files and counts: docs/DATA.md):"]
    for name in SOURCES:
        parameters = inspect.signature(source_class(name)).parameters.values()
        own = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("views", "protocol")]
        shown = ", ".join(f"{p.name} ({json.dumps(p.default)})" for p in own)
        protocols = "" if "protocol" in source_options(name) else "; one protocol"
        lines.append(f"  {name:13} {shown or '-'}{protocols}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="make_shards",
        description="Turn a data set in its official layout into a folder of shards (format: shards/README.md).\n"
        "A build that was interrupted continues when the same command is given again.",
        epilog=_source_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help=f"the data set: {', '.join(SOURCES)}, or module:Class")
    add("--root", required=True, help="folder of the data set, or URL: s3://bucket/CheXpert-v1.0")
    add("--out", help="folder of the shards (default: shards/SOURCE), or URL: s3://bucket/shards/chexpert")
    add(
        "--staging",
        type=Path,
        metavar="DIR",
        help="where shards lie until they are stored behind the URL --out (default: in ~/.cache/scaletransfer)",
    )
    add("--list", type=Path, metavar="FILE.csv", help="write the table of what would be sharded, and stop")
    add("--labels", metavar="|".join(LABEL_MODES), help="label columns of --list (default: corrected)")
    add("--protocol", default="corrected", choices=("corrected", "paper"), help="splits and rows: %(choices)s")
    add("--views", help="views to keep, such as PA,AP,L, or all (default: PA,AP; padchest: all five)")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="another option of the source (below)")
    add("--workers", type=int, default=1, metavar="N", help="processes (default: 1); any number, same bytes")
    add(
        "--part",
        metavar="I/N",
        help="write one of N parts, I from 0 to N - 1, and no index: the tasks of a job array with --array=0-7 give "
        "$SLURM_ARRAY_TASK_ID/8 (launch/slurm/make_shards.sbatch)",
    )
    add("--merge", action="store_true", help="when all parts are there: check them and write the index")
    add("--measure", action="store_true", help="with --bit-depth 8: print the --pixel-max that --part needs, and stop")
    add("--shard-size", type=int, default=0, metavar="N", help="samples a shard (default: about 100 MB)")
    add("--seed", type=int, default=0, metavar="S", help="of the order of the samples (default: 0)")
    add("--size", type=int, default=0, metavar="PX", help="scale larger images down to this short side")
    add("--encode", default="", choices=("jpg", "png"), help="format for every image (default: as it is)")
    add("--quality", type=int, default=95, metavar="Q", help="of images re-encoded as JPEG (default: 95)")
    add(
        "--bit-depth",
        default="keep",
        choices=("keep", "8"),
        help="keep leaves 16-bit images as they are (default); 8 scales them to 8 bits from the range that all "
        "images of the data set use",
    )
    add("--pixel-max", type=int, metavar="N", help="with --bit-depth 8: the value that becomes 255, not measured")
    add(
        "--salt-file",
        type=Path,
        metavar="F",
        help="secret that keys are made with (default: made once, kept "
        "in ~/.config/scaletransfer/salt; public data sets use a public one)",
    )
    add("--check-images", action="store_true", help="with --list: see that every image file is there")
    add("--allow-missing", action="store_true", help="leave out (quarantine) records without an image file")
    add("--limit", type=int, metavar="N", help="only the first N records of each split")
    add("--overwrite", action="store_true", help="replace shards that are in --out already")
    return parser


if __name__ == "__main__":
    from scaletransfer.cli import run_command

    raise SystemExit(run_command(main))

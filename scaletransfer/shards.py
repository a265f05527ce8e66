"""`scaletransfer shards COMMAND`: verify (and repair) folders of shards, say what they hold, cut them anew.

The Python side of making them is here too: `plan_shards(open_source(...), salt)` and `build(plan, folder)`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence

from tqdm import tqdm

from scaletransfer.cli import CommandParser
from scaletransfer.foreign import index_options, run_index
from scaletransfer.index import load_index, read_index
from scaletransfer.reshard import reshard_options, run_reshard
from scaletransfer.shard_build import BuildReport, build
from scaletransfer.shard_image import Encoding
from scaletransfer.shard_info import describe, details, summary
from scaletransfer.shard_plan import Plan, plan_shards
from scaletransfer.shard_repair import repair_options, run_repair
from scaletransfer.shard_verify import verify

__all__ = ["BuildReport", "Encoding", "Plan", "build", "describe", "plan_shards", "shards_main", "verify"]


def shards_main(argv: Sequence[str]) -> int:
    """`scaletransfer shards COMMAND ...`; exit status 1 if a folder that is verified has problems."""
    parser = CommandParser(prog="scaletransfer shards", description="Look at folders of shards.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (text, add_options, run) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        add_options(command)
        command.set_defaults(run=run)
    options = parser.parse_args(argv)
    status: int = options.run(options)
    return status


def _verify_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folders", nargs="+", metavar="DIR", help="folder with an index.json, or its URL")
    add("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    add("--no-decode", action="store_true", help="do not decode the images, which takes the most time")
    repair_options(parser)


def _verify(options: argparse.Namespace) -> int:
    status = 0
    if not options.repair and (options.root or options.salt_file or options.source or options.option):
        raise ValueError("--root, --salt-file, --source and --option are for --repair: give that as well")
    for folder in options.folders:
        if options.repair:
            run_repair(folder, options)
        with tqdm(total=_samples(folder), unit="img", desc=f"verify {folder}", disable=None) as bar:
            problems = verify(folder, workers=options.workers, decode=not options.no_decode, progress=bar.update)
        for problem in problems:
            print(problem)
        print(f"{folder}: {f'{len(problems)} problem(s)' if problems else 'ok'}")
        status = 1 if problems else status
    return status


def _samples(folder: str) -> int | None:
    """For a progress bar; None where the index cannot be read, which `verify` says."""
    try:
        return sum(info.samples for info in read_index(folder).splits.values())
    except ValueError:
        return None


def _info_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folder with an index.json, or its URL")
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object a folder, a line each")


def _info(options: argparse.Namespace) -> int:
    for folder in options.folders:
        index = load_index(folder)
        print(json.dumps(summary(index), sort_keys=True) if options.json else details(index))
    return 0


_Command = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]
_COMMANDS: dict[str, _Command] = {
    "verify": ("compare every file, member, label and image with the index", _verify_options, _verify),
    "reshard": ("cut a folder anew: other shard size, image size or order", reshard_options, run_reshard),
    "info": ("say what a folder holds", _info_options, _info),
    "index": ("make an index for WebDataset tars that others made", index_options, run_index),
}

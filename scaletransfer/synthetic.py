"""`scaletransfer synthetic`: data sets with drawn pictures, to try things on without any data.

`chexpert` draws a folder in CheXpert's official layout (`synthetic_chexpert`), to pre-train on;
`xray_folder` draws other findings of other patients, a folder a class (`synthetic_folder`), to transfer to.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from scaletransfer.cli import CommandParser
from scaletransfer.synthetic_chexpert import synthetic_chexpert
from scaletransfer.synthetic_folder import CLASSES, synthetic_xray_folder

# Options that one source alone has; the first of them is required.
_OWN = {"chexpert": ("rows", "table"), "xray_folder": ("images-per-class", "valid-per-class")}


def main(argv: Sequence[str]) -> int:
    """The command: `argv` is what follows `scaletransfer synthetic`. Returns 0; user errors are
    ValueErrors."""
    parser = CommandParser(
        prog="scaletransfer synthetic",
        description="Draw a data set, for trying the project without any data: in CheXpert's layout, or a folder "
        "with one folder a class.",
    )
    parser.add_argument("source", choices=list(_OWN), help="whose layout")
    parser.add_argument("--out", type=Path, required=True, help="folder to make, such as datasets/CheXpert-v1.0")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other patients (default: 0)")
    parser.add_argument("--size", type=int, default=320, help="about the short side in pixels (default: 320)")
    parser.add_argument("--workers", type=int, default=_cores(), help="processes (default: one a core, at most 8)")
    chexpert = parser.add_argument_group("chexpert")
    chexpert.add_argument("--rows", type=int, help="images in all; a tenth of them is for validation (required)")
    chexpert.add_argument(
        "--table",
        choices=["auto", "real", "drawn"],
        help="take patients of the real table in the installed torchxrayvision, or draw them (default: auto)",
    )
    folder = parser.add_argument_group("xray_folder")
    folder.add_argument("--images-per-class", type=int, help="training images of each class (required)")
    folder.add_argument("--valid-per-class", type=int, help="validation images of each class (default: as many)")
    args = parser.parse_args(argv)
    _check_own(args)
    print(_chexpert(args) if args.source == "chexpert" else _xray_folder(args))
    return 0


def _check_own(args: argparse.Namespace) -> None:
    """Refuse what another source has, and ask for what this one needs."""
    for source, names in _OWN.items():
        for name in names:
            if source != args.source and getattr(args, name.replace("-", "_")) is not None:
                own = " and ".join(f"--{option}" for option in _OWN[args.source])
                raise ValueError(f"--{name} belongs to the source {source}; {args.source} has {own}.")
    needed = _OWN[args.source][0]
    if getattr(args, needed.replace("-", "_")) is None:
        raise ValueError(f"the source {args.source} needs --{needed} (see scaletransfer synthetic --help)")


def _chexpert(args: argparse.Namespace) -> str:
    done = synthetic_chexpert(
        args.out, rows=args.rows, seed=args.seed, size=args.size, workers=args.workers, table=args.table or "auto"
    )
    kind = "rows of the real table (torchxrayvision)" if done["rows"] == "real" else "drawn rows"
    return (
        f"{args.out}: {done['train']} training images of {done['train_patients']} patients, {done['valid']} "
        f"validation images of {done['valid_patients']} patients, from {kind}; the pictures are drawn."
    )


def _xray_folder(args: argparse.Namespace) -> str:
    done = synthetic_xray_folder(
        args.out,
        images_per_class=args.images_per_class,
        valid_per_class=args.valid_per_class,
        seed=args.seed,
        size=args.size,
        workers=args.workers,
    )
    return (
        f"{args.out}: {done['train']} training and {done['valid']} validation images, each of another patient, "
        f"of the classes {', '.join(CLASSES)}; the pictures are drawn."
    )


def _cores() -> int:
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

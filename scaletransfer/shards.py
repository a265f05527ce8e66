"""Look at finished shards: `verify` compares every byte with the index, `describe` says what a folder holds.

The Python side of making them is here too: `plan_shards(open_source(...), salt)` and `build(plan, folder)`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaletransfer.cli import CommandParser
from scaletransfer.files import json_bytes
from scaletransfer.index import ShardIndex, load_index
from scaletransfer.sample_table import TOKEN_SEPARATOR, count_patients, label_totals
from scaletransfer.shard_build import INFO_NAME, BuildReport, build, timm_description, wids_description
from scaletransfer.shard_image import Encoding
from scaletransfer.shard_plan import Plan, plan_shards

__all__ = ["BuildReport", "Encoding", "Plan", "build", "describe", "plan_shards", "shards_main", "verify"]

_SHOWN_REASONS = 3


def verify(folder: str | os.PathLike[str]) -> list[str]:
    """Compare a folder of shards with its index, completely; the problems found, one sentence each.

    Checked: sizes and sha256 of shards and tables; names, order, place and size of tar members (whatever is
    not an image or a label of the table is named); labels, view and patient of every sample against the
    table; totals, numbers of samples and patients; unique keys; the side files; stray shards.  No image is
    decoded and nothing is unpickled or extracted.
    """
    folder = Path(folder)
    try:
        index = load_index(folder)
    except ValueError as error:
        return [str(error)]
    problems: list[str] = []
    keys: dict[int, str] = {}
    patients: dict[str, int] = {"": -1}
    expected_files = {INFO_NAME: json_bytes(timm_description(index.splits))}
    for split, info in index.splits.items():
        expected_files[f"wids-{split}.json"] = json_bytes(wids_description(index.source, split, info))
        try:
            table = index.table(split)
        except ValueError as error:
            problems.append(str(error))
            continue
        if label_totals(table, index.task, index.label_names) != info.totals:
            problems.append(f"{folder}: the totals of the split {split} in index.json are not those of its table")
        if count_patients(table) != info.patients:
            problems.append(f"{folder}: the number of patients of the split {split} is not that of its table")
        for key in table["key"].tolist():
            if keys.setdefault(key, split) != split:
                problems.append(f"{folder}: the key {index.source}-{key:016x} is in {keys[key]} and in {split}")
        if len(np.unique(table["key"])) != len(table):
            problems.append(f"{folder}: the split {split} holds a key twice")
        for number, shard in enumerate(info.shards):
            rows = np.flatnonzero(table["shard"] == number)
            if len(rows) != shard.samples:
                problems.append(
                    f"{folder / shard.file}: {shard.samples} samples in index.json, {len(rows)} in the table"
                )
            problems += _verify_shard(index, split, number, rows, patients)
    for name, content in expected_files.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            problems.append(f"{path} is missing or does not fit index.json")
    known = {shard.file for info in index.splits.values() for shard in info.shards}
    strays = sorted(p.name for p in folder.iterdir() if p.name.endswith((".tar", ".tmp")) and p.name not in known)
    problems += [f"{folder / name} does not belong to the index" for name in strays]
    return problems


def describe(index: ShardIndex) -> str:
    """What an index holds, as a few lines of text."""
    image = index.image
    size = f"short side at most {image.size}" if image.size else "original size"
    colour = "grey" if image.channels == 1 else "colour"
    lines = [
        f"{index.source} ({index.task}, {len(index.label_names)} labels), {image.extension}, {size}, "
        f"{colour}, {image.bit_depth} bits, key salt {index.salt_fingerprint}",
        f"licence: {index.licence}",
    ]
    for split, info in index.splits.items():
        total = sum(shard.bytes for shard in info.shards)
        patients = f", {info.patients:,} patients" if info.patients else ""
        lines.append(
            f"  {split:6} {info.samples:,} samples{patients}, {len(info.shards)} shards, "
            f"{total / 1e6:,.1f} MB, {len(info.quarantine)} quarantined"
        )
        shown = info.quarantine[:_SHOWN_REASONS]
        lines += [f"         {entry['key']}: {entry['reason']}" for entry in shown]
        if len(info.quarantine) > len(shown):
            lines.append(f"         and {len(info.quarantine) - len(shown)} more, in index.json")
    return "\n".join(lines)


def shards_main(argv: Sequence[str]) -> int:
    """`scaletransfer shards verify|info DIR ...`; exit status 1 if a folder has problems."""
    parser = CommandParser(prog="scaletransfer shards", description="Look at folders of shards.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("verify", "compare every file, member and label with the index"),
        ("info", "say what a folder holds"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("folders", nargs="+", metavar="DIR", type=Path, help="folder with an index.json")
    options = parser.parse_args(argv)
    status = 0
    for folder in options.folders:
        if options.command == "info":
            print(describe(load_index(folder)))
            continue
        problems = verify(folder)
        for problem in problems:
            print(problem)
        print(f"{folder}: {f'{len(problems)} problem(s)' if problems else 'ok'}")
        status = 1 if problems else status
    return status


def _verify_shard(
    index: ShardIndex, split: str, number: int, rows: np.ndarray[Any, Any], patients: dict[str, int]
) -> list[str]:
    path, shard = index.path(split, number), index.splits[split].shards[number]
    problems = []
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            problems.append(f"{path}: sha256 differs from index.json; copy the file again")
    label = "json" if index.task == "multilabel" else "cls"
    names = [f"{key}.{extension}" for key in index.keys(split, rows) for extension in (index.image.extension, label)]
    try:
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
            contents = {m.name: _content(tar, m) for m in members if m.name.endswith(f".{label}")}
    except tarfile.TarError as error:
        return [*problems, f"{path} is not a readable tar file ({error})"]
    found = [member.name for member in members]
    expected = set(names)
    problems += [f"{path}: unexpected member {name!r}" for name in found if name not in expected]
    problems += [f"{path}: member {name!r} is missing" for name in names if name not in set(found)]
    problems += [f"{path}: member {m.name!r} is not a plain file" for m in members if not m.isreg()]
    twice = sorted(name for name, number in Counter(found).items() if number > 1)
    problems += [f"{path}: member {name!r} is there twice" for name in twice]
    if found != names:
        if sorted(found) == sorted(names):
            problems.append(f"{path}: the members are not in the order of the table")
        return problems
    table = index.table(split)[rows]
    for row, image, text in zip(table, members[::2], members[1::2], strict=True):
        if (image.offset_data, image.size) != (int(row["offset"]), int(row["size"])):
            problems.append(f"{path}: {image.name!r} does not lie where the table says")
        if not _same_label(index, row, contents[text.name], patients):
            problems.append(f"{path}: {text.name!r} does not say what the table says")
    return problems


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member) if member.isreg() else None
    return file.read() if file else b""


def _same_label(index: ShardIndex, row: Any, content: bytes, patients: dict[str, int]) -> bool:
    if index.task == "multiclass":
        return content == str(int(row["label"])).encode()
    view = index.views[row["view"]] if row["view"] >= 0 else ""
    try:
        found = json.loads(content)
        code = found["patient"]
        if index.label_kind == "tokens":
            listed = found.pop("tokens").split(TOKEN_SEPARATOR)
            found["labels"] = [int(name in listed) for name in index.label_names]
        expected = {"labels": row["labels"].tolist(), "patient": code, "view": view}
        # one code a number and one number a code, over all splits
        number = patients.setdefault(code, int(row["patient"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return bool(found == expected and number == int(row["patient"]))

"""Make again what is missing or damaged in a folder of shards: from the data set, or from what is intact.

index.json is what is believed: nothing takes a file's place unless it has the hash that stands there.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from scaletransfer import keys
from scaletransfer.files import field_of, sync_folder, write_atomically
from scaletransfer.foreign_members import is_foreign
from scaletransfer.index import INDEX_NAME, ShardIndex, read_index
from scaletransfer.reshard import OPTION, plan_again
from scaletransfer.sample_table import patient_numbers
from scaletransfer.shard_build import sample_table, write_missing
from scaletransfer.shard_image import Encoding
from scaletransfer.shard_output import INFO_NAME, Output, claimed, clear, ours, remove_work
from scaletransfer.shard_plan import FirstRecords, Plan, Sample, plan_shards, with_digest
from scaletransfer.shard_scan import Found, samples_in
from scaletransfer.shard_verify import shard_problem, side_files, table_of
from scaletransfer.shard_writer import shard_tasks
from scaletransfer.sources import named_values, open_source, source_options
from scaletransfer.storage import is_url
from scaletransfer.storage_errors import shown

REPAIR_FOLDER = ".repair"
"""In the folder that is repaired: shards until all of them are made and have the right hash."""


def repair(
    folder: str | os.PathLike[str],
    *,
    root: Path | None = None,
    salt_file: Path | None = None,
    source: str = "",
    options: Mapping[str, Any] | None = None,
    workers: int = 1,
    progress: Callable[[int], object] = lambda samples: None,
) -> list[str]:
    """Make again every shard, table and side file of `folder` that is not what index.json says; the names of those.

    Shards are made from the data set in `root`, or, of a folder that was resharded, from the folder that it was cut
    from.  Tables and side files come from the shards and index.json wherever that is enough.  salt_file: as for
    make_shards.  source: module:Class of a source of your own.  options: source options that index.json does not
    record, as they are paths.  `progress` is called with numbers of samples of the shards that are made.

    All of it is made and compared before the first file is replaced; interrupted, it goes on when it is called again.
    Raises ValueError if index.json is damaged, `root` is needed and missing, or does not give the bytes that index.json
    says (other data, salt, options or libraries; the sentence says which, as far as that can be known).
    """
    if is_url(folder):
        raise ValueError(
            f"{shown(os.fspath(folder))} can only be repaired on a disk: copy the folder and name the copy"
        )
    folder = Path(folder)
    index = read_index(folder)
    if is_foreign(index.encoder):
        raise ValueError(f"{folder} holds tars that make_shards has not made; copy those that are damaged again")
    planner = _Planner(index, root, salt_file, source, options or {}, workers)
    broken, first = _broken(index, workers)
    made = []
    if broken:
        plans = planner.plans(f"{len(broken)} of the shards can't be used (the first: {first})")
        made += _shards(index, plans, broken, workers, progress)
    for split, info in index.splits.items():
        try:
            table_of(index, split)
        except ValueError:
            write_atomically(folder / info.table_file, _table(index, split, planner))
            made.append(info.table_file)
    for name, content in side_files(index).items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, content)
            made.append(name)
    names = Output(folder).names()
    drafts = [*ours(names), f"{INDEX_NAME}.tmp", f"{INFO_NAME}.tmp"]
    Output(folder).remove([name for name in drafts if name.endswith(".tmp")])
    return made


class _Planner:
    """The plan that a folder was made with, when it is first needed."""

    def __init__(
        self,
        index: ShardIndex,
        root: Path | None,
        salt_file: Path | None,
        source: str,
        options: Mapping[str, Any],
        workers: int,
    ) -> None:
        self.index, self.root, self.salt_file, self.workers = index, root, salt_file, workers
        self.source, self.options = source or index.source, options
        self._plans: list[Plan] = []

    def plans(self, why: str) -> list[Plan]:
        """The plans of the hash that is in index.json, which differ in what it does not record: whether an image that
        has the right format already was to be encoded.

        Raises ValueError, which begins with `why` where there is no root.
        """
        if not self._plans:
            resharded = OPTION in self.index.options
            if self.root is None:
                what = "the folder of shards that it was cut from" if resharded else "the folder of the data set"
                raise ValueError(f"{why}: give --root, {what}, to make them again")
            plans = self._resharded(self.root) if resharded else self._sourced(self.root)
            self._plans = [plan for plan in plans if plan.digest == self.index.plan_sha256]
            if not self._plans:
                raise ValueError(
                    f"{self.root} is not what {self.index.folder} was made from: {_difference(plans[0], self.index)}; "
                    "nothing was replaced"
                )
        return self._plans

    def _resharded(self, root: Path) -> list[Plan]:
        return [plan_again(self.index, root, workers=self.workers)]

    def _sourced(self, root: Path) -> list[Plan]:
        index = self.index
        recorded = dict(index.options)
        path = index.folder / INDEX_NAME
        seed = field_of(recorded, "seed", int, path, "options.")
        shard_size = field_of(recorded, "shard_size", dict, path, "options.")
        opened: Any = open_source(self.source, root, **self._settings())
        salt = _salt(index, opened.public, self.salt_file)
        if "limit" in recorded:
            opened = FirstRecords(opened, field_of(recorded, "limit", int, path, "options."))
        extension = index.image.extension
        plan = plan_shards(
            opened,
            salt,
            seed=seed,
            shard_size=shard_size,
            encoding=Encoding(encode=extension if extension in ("jpg", "png") else ""),
            allow_missing=True,  # whether they were missing then is in the plan's hash
            options={name: value for name, value in recorded.items() if name not in ("seed", "shard_size")},
        )
        return [with_digest(replace(plan, encoding=encoding)) for encoding in _encodings(index, plan)]

    def _settings(self) -> dict[str, Any]:
        """Options for `open_source`: those of index.json and those that were given."""
        settings = dict(self.options)
        known = source_options(self.source)
        for name, value in self.index.options.items():
            option = "seed" if name == "split_seed" else name
            if name == "views" and isinstance(value, list):
                value = ",".join(map(str, value))
            if option in known and name not in ("seed", "shard_size"):
                settings.setdefault(option, value)
        return settings


def _salt(index: ShardIndex, public: bool, file: Path | None) -> bytes:
    if public and not file:
        salt = keys.PUBLIC_SALT
    else:
        path = file or keys.default_salt_file()
        if not path.expanduser().exists():
            raise ValueError(f"{path} is not there; give the salt that the shards were made with by --salt-file")
        salt = keys.load_salt(path)
    if keys.fingerprint(salt) != index.salt_fingerprint:
        raise ValueError(
            f"{index.folder} was made with another salt (fingerprint {index.salt_fingerprint}, this one has "
            f"{keys.fingerprint(salt)}); give that one by --salt-file"
        )
    return salt


def _encodings(index: ShardIndex, plan: Plan) -> Iterator[Encoding]:
    """What `encoder` of index.json may stand for: it does not tell whether --encode or --pixel-max were given."""
    entry = index.encoder
    white = entry.get("range", 0)
    for pixel_max in dict.fromkeys((0, white)):
        for encode in dict.fromkeys(("", plan.encoding.encode)):
            yield replace(
                plan.encoding,
                size=index.image.size,
                encode=encode,
                quality=entry.get("quality", 95),
                bit_depth=entry.get("bit_depth", 0),
                pixel_max=pixel_max if entry.get("bit_depth") else 0,
            )


def _difference(plan: Plan, index: ShardIndex) -> str:
    """In words, what a plan and an index do not have in common."""
    there, here = ({**entry, "range": 0} for entry in (index.encoder, plan.encoder))
    if there.get("name") == "original" == here.get("name"):
        there, here = {}, {}
    differing = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if differing:
        versions = ", ".join(f"{name} {there.get(name)!r}, here {here.get(name)!r}" for name in sorted(differing))
        return f"images were encoded by other libraries or settings ({versions})"
    if plan.label_names != index.label_names:
        return "its labels have other names"
    for split in dict.fromkeys([*index.splits, *plan.samples]):
        samples = plan.samples.get(split, ())
        info = index.splits.get(split)
        known = info.samples + len(info.quarantine) if info else 0
        if len(samples) != known:
            return f"its split {split} has {len(samples)} records, and that of the folder had {known}"
        was = {e["key"] for e in info.quarantine if "missing" in e["reason"]} if info else set()
        lost = [sample for sample in samples if sample.missing and sample.key not in was]
        if lost:
            return f"{len(lost)} images of its split {split} are missing, which were there (the first: {lost[0].image})"
    return "its table (labels, patients, views, which images are there) or the options of the source are others"


def _broken(index: ShardIndex, workers: int) -> tuple[dict[str, tuple[str, int]], str]:
    """({file: (split, position)} of the shards to make again, what is wrong with the first)."""
    shards = [(split, number) for split, info in index.splits.items() for number in range(len(info.shards))]

    def problem(place: tuple[str, int]) -> str:
        shard = index.splits[place[0]].shards[place[1]]
        return shard_problem(index.path(*place), shard.bytes, shard.sha256)

    with ThreadPoolExecutor(max(1, workers)) as pool:  # hashing lets other threads run
        problems = list(pool.map(problem, shards))
    broken = {index.splits[s].shards[n].file: (s, n) for (s, n), text in zip(shards, problems, strict=True) if text}
    return broken, next((text for text in problems if text), "")


def _shards(
    index: ShardIndex,
    plans: Sequence[Plan],
    broken: Mapping[str, tuple[str, int]],
    workers: int,
    progress: Callable[[int], object],
) -> list[str]:
    """Make shards in the work folder, compare all of them, and only then put them in place; their names."""
    out = Output(index.folder / REPAIR_FOLDER)
    other: list[str] = []
    with claimed(out, index.plan_sha256):
        try:
            for plan in plans:
                other = _made(out, index, plan, broken, workers, progress)
                if not other:
                    break
                clear(out)
                out.prepare()
        except ValueError:
            _remove(out)
            raise
        if other:
            _remove(out)
            raise ValueError(
                f"{other[0]}, made again from {plans[0].root}, has other bytes than index.json says: an image of it "
                f"was changed, or a library is another (index.json has {index.encoder}, here it is {plans[0].encoder})"
                "; nothing was replaced"
            )
        for file in broken:
            os.replace(out.folder / file, index.folder / file)
        sync_folder(index.folder)
        _remove(out)
    return list(broken)


def _made(
    out: Output,
    index: ShardIndex,
    plan: Plan,
    broken: Mapping[str, tuple[str, int]],
    workers: int,
    progress: Callable[[int], object],
) -> list[str]:
    """Make the broken shards in `out`; those that do not have the hash of the index."""
    if plan.encoding.bit_depth and not plan.encoding.pixel_max:
        # measured then; as all images are those of then, it is known
        plan = replace(plan, encoding=replace(plan.encoding, pixel_max=index.encoder["range"]))
    tasks = [task for task in shard_tasks(plan, out.folder) if task.file in broken]
    assert len(tasks) == len(broken), "a plan of the same hash has all of the shards"
    markers, _, _ = write_missing(out, tasks, workers, progress)
    wanted = {file: index.splits[split].shards[number].sha256 for file, (split, number) in broken.items()}
    return [file for file in broken if markers[file]["sha256"] != wanted[file]]


def _remove(out: Output) -> None:
    clear(out)
    remove_work(out)
    with suppress(OSError):  # files of somebody else in it stay
        out.folder.rmdir()


def _sums(index: ShardIndex, split: str, places: Sequence[tuple[int, Found]]) -> Iterator[int]:
    """The CRC-32 of each image."""
    for number, inside in groupby(places, key=itemgetter(0)):
        with open(index.path(split, number), "rb") as file:
            for _, found in inside:
                file.seek(found.offset)
                yield zlib.crc32(file.read(found.size))


def _table(index: ShardIndex, split: str, planner: _Planner) -> bytes:
    """The sample table of a split from its shards, which are sound by now."""
    info = index.splits[split]
    shards = {
        name: [samples_in(index, index.path(name, n)) for n in range(len(its.shards))]
        for name, its in index.splits.items()
    }
    codes = (found.label.patient for name in shards for shard in shards[name] for found in shard)
    numbers = patient_numbers(codes)
    places = [(number, found) for number, shard in enumerate(shards[split]) for found in shard]
    rows = np.asarray(
        [(n, f.offset, f.size, crc) for (n, f), crc in zip(places, _sums(index, split, places), strict=True)], np.int64
    )

    def table(number_of: Callable[[str, str], int]) -> bytes:
        samples = [
            Sample(
                key=found.key,
                image="",
                missing=False,
                patient=found.label.patient,
                patient_number=number_of(found.key, found.label.patient),
                view=found.label.view,
                labels=found.label.labels,
            )
            for _, found in places
        ]
        return sample_table(index, samples, rows)[1]

    data = table(lambda key, code: numbers[code])
    if hashlib.sha256(data).hexdigest() != info.table_sha256:
        # patients all of whose images were left out have numbers too
        plan = planner.plans(f"{info.table_file} can't be used, and its patients' numbers are not in the shards")[0]
        planned = {sample.key: sample.patient_number for sample in plan.samples[split]}
        data = table(lambda key, code: planned.get(key, -1))
    if hashlib.sha256(data).hexdigest() != info.table_sha256:
        raise ValueError(f"{index.folder / info.table_file} does not follow from the shards; make the folder again")
    return data


def repair_options(parser: argparse.ArgumentParser) -> None:
    """Declare what `scaletransfer shards verify` takes for --repair."""
    add = parser.add_argument
    add("--repair", action="store_true", help="make again what is missing or damaged")
    add("--root", type=Path, metavar="R", help="with --repair: folder of the data set (of shards, if resharded)")
    add("--salt-file", type=Path, metavar="F", help="with --repair: the salt, as for make_shards")
    add(
        "--source", default="", metavar="M:C", help="with --repair: the source, if it is one of your own (module:Class)"
    )
    add(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="with --repair: another option of the source",
    )


def run_repair(folder: str, options: argparse.Namespace) -> None:
    """Repair one folder as the options say, and print what was made."""
    with tqdm(unit="img", desc=f"repair {folder}", disable=None) as bar:
        made = repair(
            folder,
            root=options.root,
            salt_file=options.salt_file,
            source=options.source,
            options=named_values(options.option),
            workers=options.workers,
            progress=bar.update,
        )
    for name in made:
        print(f"{Path(folder) / name} was made again")

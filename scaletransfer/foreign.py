"""`scaletransfer shards index DIR`: an index and sample tables over WebDataset tars that others made.

The tars stay as they are.  After it they are read by (shard, offset, size) as our own are (`data.format: webdataset`).
Archives are untrusted: what `tars` refuses is refused, members that are neither image nor label are not read, and
nothing is unpacked or unpickled.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from scaletransfer import keys, labels
from scaletransfer.files import write_atomically
from scaletransfer.foreign_labels import SOURCES, LabelColumn, LabelRule, read_label_names
from scaletransfer.foreign_members import KEYS_OF, Naming, is_foreign, naming_secret
from scaletransfer.foreign_scan import IMAGE_EXTENSIONS, Settings, Shard, choose_splits, scan_tars, tars_of
from scaletransfer.image_files import INSIDE
from scaletransfer.index import INDEX_NAME, ShardIndex, load_index
from scaletransfer.index import write_index as write_index_file
from scaletransfer.index_fields import ShardInfo, SplitInfo, split_order, split_to_json
from scaletransfer.pixel_range import WHITE16
from scaletransfer.records import ImageInfo, probe_images
from scaletransfer.sample_table import label_totals, table_dtype

COMMAND = "scaletransfer shards index"
_PROBES = 2048


def index_tars(
    folder: Path,
    splits: Mapping[str, Sequence[str]],
    settings: Settings,
    salt: bytes,
    *,
    out: Path | None = None,
    workers: int = 1,
    overwrite: bool = False,
    pixel_max: int = 0,
    progress: Callable[[int], object] = lambda tars: None,
) -> ShardIndex:
    """Read the headers and labels of the tars in `folder` and write `index.json` and the sample tables; opens them.

    splits: split -> names of its tars.  out: another folder for the index; the tars are linked there (symbolic links).
    pixel_max: the largest value of 16-bit images; 0: as found in some.  workers: processes, a tar each.
    progress: called with numbers of tars.  Memory: 44 bytes a sample, and its labels.

    Raises ValueError, in one sentence with shard, member and offset, for a tar that `tars` refuses, a sample without
    image or label (unless left out), with two images, or with the key of another, an image that is none, and labels
    that do not fit each other; and where there is an index already.
    """
    place = out or folder
    _check_place(place, overwrite)
    naming = Naming(naming_secret(salt), settings.keys_of, frozenset(settings.extensions))
    column, left_out = LabelColumn(settings.label_names), Counter[str]()
    files = [(split, name) for split in sorted(splits, key=split_order) for name in splits[split]]
    shards: dict[str, list[tuple[str, Shard]]] = {}
    paths = [folder / name for _, name in files]
    for (split, name), shard in zip(files, scan_tars(paths, settings, naming, workers), strict=True):
        for row, label in enumerate(shard.labels):
            try:
                column.add(label)
            except ValueError as error:
                where = f"the label of the sample whose image is at byte {shard.offsets[row]}"
                raise ValueError(f"{folder / name}: {where} {error}") from None
        shard.labels.clear()
        left_out.update(shard.left_out)
        progress(1)
        shards.setdefault(split, []).append((name, shard))
    for split, found in shards.items():
        if not any(shard.offsets for _, shard in found):
            raise ValueError(f"{folder}: the tars of the split {split} hold no sample with image and label; {SOURCES}")
    kind, names, rows = column.finish()
    task = "multiclass" if kind == "classes" else "multilabel"
    _check_vocabulary(settings.name, task, names, rows)
    tables, start = {}, 0
    for split, found in shards.items():
        table = _table(found, task, names)
        table["labels" if task == "multilabel" else "label"] = rows[start : start + len(table)]
        start += len(table)
        tables[split] = table
    _check_keys(folder, shards, tables)
    image = _image(folder, shards, pixel_max)
    place.mkdir(parents=True, exist_ok=True)
    (place / INDEX_NAME).unlink(missing_ok=True)  # an old index must not describe new tables
    if out is not None:
        for path in paths:
            _link(path, out / path.name)
    content = {
        "source": settings.name,
        "task": task,
        "label_names": list(names),
        "label_kind": kind,
        "views": [],
        "image": asdict(image),
        "splits": {split: _write_table(place, split, tables[split], shards[split], task, names) for split in tables},
        "salt_fingerprint": keys.fingerprint(salt),
        "licence": settings.licence,
        "encoder": naming.encoder(),
        "options": {"label": ":".join(filter(None, (settings.labels.extension, settings.labels.field)))},
        "left_out": dict(sorted(left_out.items())),
        "plan_sha256": _digest(shards),
    }
    write_index_file(place, content)
    return load_index(place)


def check_format(index: ShardIndex, data_format: str) -> None:
    """ValueError, naming data.format, where an opened folder is not one of `data_format` (shards, webdataset)."""
    if is_foreign(index.encoder) and data_format != "webdataset":
        raise ValueError(
            f"{index.folder} holds tars that make_shards has not made: set data.format to webdataset to train on them"
        )
    if not is_foreign(index.encoder) and data_format == "webdataset":
        raise ValueError(
            f"{index.folder} was made by make_shards and data.format is webdataset, which is for other tars: set "
            "data.format to shards"
        )


def check_indexed(folder: str | os.PathLike[str], data_format: str) -> None:
    """ValueError, naming the command, where data.format is webdataset and the local `folder` has no index yet."""
    path = Path(folder)
    if data_format == "webdataset" and path.is_dir() and not (path / INDEX_NAME).is_file():
        raise ValueError(f"{path} has no {INDEX_NAME}: make one for its tars by {COMMAND} {path}")


def _table(found: Sequence[tuple[str, Shard]], task: str, names: Sequence[str]) -> NDArray[Any]:
    table = np.zeros(sum(len(shard.offsets) for _, shard in found), table_dtype(task, len(names)))
    table["shard"] = np.repeat(np.arange(len(found)), [len(shard.offsets) for _, shard in found])
    for column, values in (("offset", "offsets"), ("size", "sizes"), ("key", "numbers"), ("crc", "sums")):
        table[column] = np.concatenate([np.array(getattr(shard, values), table[column].dtype) for _, shard in found])
    table["patient"] = table["view"] = -1
    return table


def _check_vocabulary(name: str, task: str, names: Sequence[str], rows: NDArray[Any]) -> None:
    """Sources that we know have findings and rules of their own."""
    if task == "multilabel" and (name in labels.STATE_SOURCES or name == labels.PADCHEST):
        try:
            labels.targets(rows[:1], names, name)
        except ValueError as error:
            raise ValueError(
                f"{name} is the name of a data set with findings of its own, which these labels are not ({error}); "
                "give another --name"
            ) from None


def _check_keys(
    folder: Path, shards: Mapping[str, Sequence[tuple[str, Shard]]], tables: Mapping[str, NDArray[Any]]
) -> None:
    numbers = np.concatenate([table["key"] for table in tables.values()])
    order = np.argsort(numbers, kind="stable")
    twice = np.flatnonzero(numbers[order[1:]] == numbers[order[:-1]])
    if not len(twice):
        return
    places = []
    for row in sorted(int(order[twice[0] + step]) for step in (0, 1)):
        for split, table in tables.items():
            if row < len(table):
                places.append((folder / shards[split][table["shard"][row]][0], int(table["offset"][row])))
                break
            row -= len(table)
    (first, at), (second, then) = places
    with open(second, "rb") as file:
        file.seek(then - BLOCKSIZE)
        shown = file.read(100).split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
    raise ValueError(
        f"{second}: the sample of the member {shown!r} at byte {then} has the name of another one, in {first} at byte "
        f"{at}, and {len(twice)} sample(s) in all are so; take copies out, or give --keys-of-shard where names begin "
        "anew in each tar"
    )


@dataclass(frozen=True, slots=True)
class _Probe:
    """What `probe_images` asks of a record."""

    image: str
    span: tuple[int, int]
    source_id: str = ""
    split: str = ""
    patient: str = ""
    labels: int = 0
    view: str = ""
    line: int = 0


def _image(folder: Path, shards: Mapping[str, Sequence[tuple[str, Shard]]], pixel_max: int) -> ImageInfo:
    """Image settings of all splits together, from the headers of some images of each tar."""
    every = [(name, shard) for found in shards.values() for name, shard in found if shard.offsets]
    total = sum(len(shard.offsets) for _, shard in every)
    step = max(1, -(-total // _PROBES))
    probes, start = [], 0
    for name, shard in every:
        for row in range(-start % step, len(shard.offsets), step):
            inside = f"the image at byte {shard.offsets[row]}"
            probes.append(_Probe(f"{name}{INSIDE}{inside}", (shard.offsets[row], shard.sizes[row])))
        start += len(shard.offsets)
    kinds = {{"jpeg": "jpg", "tiff": "tif"}.get(text, text) for _, shard in every for text in shard.extensions}
    info = asdict(probe_images(folder, probes, _PROBES))
    deep = "pixel_max" if info["bit_depth"] == 16 else "deep_max"
    if pixel_max and info[deep]:
        info[deep] = pixel_max
    return ImageInfo(**{**info, "extension": kinds.pop() if len(kinds) == 1 else ""})


def _write_table(
    place: Path,
    split: str,
    table: NDArray[Any],
    found: Sequence[tuple[str, Shard]],
    task: str,
    names: Sequence[str],
) -> dict[str, Any]:
    buffer = io.BytesIO()
    np.save(buffer, table, allow_pickle=False)
    file = f"samples-{split}.npy"
    write_atomically(place / file, buffer.getvalue())
    infos = [
        ShardInfo(file=name, samples=len(shard.offsets), bytes=shard.bytes, sha256=shard.sha256)
        for name, shard in found
    ]
    return split_to_json(
        SplitInfo(
            samples=len(table),
            patients=0,
            table_file=file,
            table_sha256=hashlib.sha256(buffer.getbuffer()).hexdigest(),
            shards=tuple(infos),
            totals=label_totals(table, task, names),
            quarantine=(),
        )
    )


def _digest(shards: Mapping[str, Sequence[tuple[str, Shard]]]) -> str:
    lines = [f"{split} {name} {shard.sha256}\n" for split, found in shards.items() for name, shard in found]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _check_place(place: Path, overwrite: bool) -> None:
    path = place / INDEX_NAME
    if not path.exists():
        return
    try:
        foreign = is_foreign(json.loads(path.read_bytes())["encoder"])
    except (ValueError, LookupError, TypeError, AttributeError):
        foreign = False
    if not foreign:
        raise ValueError(
            f"{path} is not one that this command writes: train on a folder of make_shards by data.format shards, or "
            "give another folder by --out"
        )
    if not overwrite:
        raise ValueError(f"{path} exists: give --overwrite to index the tars again")


def _link(path: Path, link: Path) -> None:
    if link.is_symlink():
        link.unlink()
    if link.exists():
        raise ValueError(f"{link} exists and is no link to a tar; give an empty folder by --out")
    link.symlink_to(path.resolve())


def index_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add("folder", metavar="DIR", help="folder with the .tar files")
    add("--out", metavar="DIR2", help="where to write the index (default: DIR); the tars are linked there")
    add("--label", default="cls", metavar="cls|json:FIELD", help="where labels are (default: cls)")
    add("--label-names", metavar="FILE|a,b,c", help="names of classes or findings, in order")
    add("--image-ext", default=",".join(IMAGE_EXTENSIONS), metavar="jpg,png", help="extensions of images")
    add("--splits", metavar="SPLIT=PATTERN,...", help="which tars are train, valid, test (default: as their names say)")
    add("--name", help="of the data set, in keys: a-z, 0-9, _ (default: the folder's)")
    add("--licence", default="not stated", metavar="TEXT", help="licence of the data set, one line for the index")
    add("--public", action="store_true", help="the set is public: make keys with the known salt")
    add("--salt-file", metavar="FILE", help="the secret that keys are made with (default: that of make_shards)")
    add("--skip-incomplete", action="store_true", help="leave samples without image or label out, and count them")
    add("--keys-of-shard", action="store_true", help="names of samples begin anew in each tar: tell them apart by it")
    add("--pixel-max", type=int, default=0, metavar="N", help="largest value of 16-bit images (default: as in some)")
    add("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    add("--overwrite", action="store_true", help="replace the index of an earlier run")


def run_index(options: argparse.Namespace) -> int:
    """Run the command; 0 when the index is there.  Raises ValueError for what the user can mend."""
    folder = Path(options.folder)
    names = tars_of(folder)
    splits = choose_splits(names, options.splits, folder)
    name = options.name
    if name is None:
        name = re.sub(r"[^a-z0-9]+", "_", folder.resolve().name.lower()).strip("_") or "tars"
    settings = Settings(
        name=name,
        labels=LabelRule.of(options.label),
        label_names=read_label_names(options.label_names),
        extensions=tuple(text.strip().lower().lstrip(".") for text in options.image_ext.split(",")),
        skip_incomplete=options.skip_incomplete,
        keys_of=KEYS_OF[1] if options.keys_of_shard else KEYS_OF[0],
        licence=" ".join(options.licence.split()),
    )
    if options.workers < 1:
        raise ValueError(f"--workers is {options.workers}; give a number of processes, 1 or more")
    if not 0 <= options.pixel_max <= WHITE16:
        raise ValueError(f"--pixel-max is {options.pixel_max}; give the largest value of 16-bit images, 1 to {WHITE16}")
    if options.public and options.salt_file:
        raise ValueError("--public and --salt-file contradict each other: public keys are made with a known salt")
    salt = keys.PUBLIC_SALT if options.public else keys.load_salt(options.salt_file)
    with tqdm(total=sum(map(len, splits.values())), unit="tar", desc=f"index {folder}", disable=None) as bar:
        index = index_tars(
            folder,
            splits,
            settings,
            salt,
            out=Path(options.out) if options.out else None,
            workers=options.workers,
            overwrite=options.overwrite,
            pixel_max=options.pixel_max,
            progress=bar.update,
        )
    for split, info in index.splits.items():
        print(f"{split}: {info.samples:,} samples in {len(info.shards)} tars")
    unused = len(names) - sum(map(len, splits.values()))
    if unused:
        print(f"not used: {unused} tars that no pattern of --splits fits")
    for reason, number in index.left_out.items():
        print(f"left out: {number:,} samples with {reason}")
    print(f"{index.folder / INDEX_NAME} written; train with data.train={index.folder} data.format=webdataset")
    return 0

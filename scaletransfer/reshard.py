"""Cut a folder of shards anew: other shard size, order, splits, or image size, without the data set itself.

Samples keep key, patient, view and labels, the folder its quarantine, licence and salt.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scaletransfer.files import field_of
from scaletransfer.foreign_members import is_foreign
from scaletransfer.image_files import INSIDE
from scaletransfer.index import INDEX_NAME, ShardIndex, load_index
from scaletransfer.shard_build import BuildReport, build
from scaletransfer.shard_image import Encoding, Stored
from scaletransfer.shard_plan import Plan, Sample, default_shard_size, shuffled, with_digest
from scaletransfer.shard_pool import run_all
from scaletransfer.shard_scan import Found, samples_in
from scaletransfer.shard_verify import shard_problem, table_of

OPTION = "resharded"
"""Entry of the index's `options` that says from what, and how, the folder was cut."""


def reshard(
    folder: str | os.PathLike[str],
    out: Path,
    *,
    shard_size: int = 0,
    size: int = 0,
    quality: int | None = None,
    encode: str = "",
    seed: int | None = None,
    splits: Sequence[str] = (),
    workers: int = 1,
    overwrite: bool = False,
    looked_at: Callable[[int], object] = lambda samples: None,
    progress: Callable[[int], object] = lambda samples: None,
) -> BuildReport:
    """Write the samples of the shards in `folder` into other shards in `out`, or continue where that was interrupted.

    shard_size: samples a shard (0: about 100 MB).  size: short side in pixels that larger images are scaled down to.
    encode, quality: as of make_shards.  seed: another order of the samples; None, or that of the folder, keeps the
    order.  splits: those to take (none named: all).  Images that need not change keep every byte.  The same arguments
    give the same bytes for any number of workers.  `looked_at` and `progress` are called with numbers of samples,
    first as shards are checked and then as they are written.

    Raises ValueError for a folder that is damaged (naming the shard), was made by others or is `out` itself, a size
    that would enlarge, options that say nothing, and what `shard_build.build` raises.
    """
    if not (shard_size or size or encode or seed is not None or splits or quality is not None):
        raise ValueError("nothing is to change: give --shard-size, --size, --encode, --seed or --splits")
    index = load_index(folder)
    if out.resolve() == index.folder.resolve():
        raise ValueError(f"--out {out} is the folder itself; give another one")
    plan = plan_reshard(
        index,
        shard_size=shard_size,
        size=size,
        quality=quality,
        encode=encode,
        seed=seed,
        splits=splits,
        workers=workers,
        progress=looked_at,
    )
    return build(plan, out, workers=workers, overwrite=overwrite, progress=progress)


def plan_reshard(
    index: ShardIndex,
    *,
    shard_size: int | Mapping[str, int] = 0,
    size: int = 0,
    quality: int | None = None,
    encode: str = "",
    seed: int | None = None,
    splits: Sequence[str] = (),
    workers: int = 1,
    progress: Callable[[int], object] = lambda samples: None,
) -> Plan:
    """The plan of `reshard`; every byte of the shards is compared with the index before."""
    _check_options(index, shard_size, size, quality, encode, seed, workers)
    chosen = [split for split in index.splits if split in splits] if splits else list(index.splits)
    for split in splits:
        if split not in index.splits:
            raise ValueError(f"--splits names {split!r}; {index.folder} has {', '.join(index.splits)}")
    keeps = seed is None or seed == index.options.get("seed")
    encoding = Encoding(
        size=size or index.image.size,
        encode=encode,
        quality=95 if quality is None else quality,
        stored=Stored(
            size=index.image.size,
            channels=index.image.channels,
            bit_depth=index.image.bit_depth,
            pixel_max=index.image.pixel_max,
            encoder=index.encoder,
        ),
    )
    extension = encode or index.image.extension
    samples = _samples(index, chosen, workers, progress)
    sizes = {}
    for split in chosen:
        if not keeps:
            assert seed is not None
            by_key = sorted(samples[split], key=lambda sample: sample.key)
            samples[split] = [by_key[row] for row in shuffled(len(by_key), seed, split)]
        given = shard_size.get(split, 0) if isinstance(shard_size, Mapping) else shard_size
        spans = [sample.span[1] if sample.span else 0 for sample in samples[split]]
        sizes[split] = given or default_shard_size(index.folder, samples[split], spans, extension, encoding)
    recorded = {
        **index.options,
        "seed": index.options.get("seed", 0) if keeps else seed,
        "shard_size": sizes,
        OPTION: {"index": index.digest, "order": "kept" if keeps else "of keys", "encode": encode, "splits": chosen},
    }
    plan = Plan(
        source=index.source,
        task=index.task,
        label_kind=index.label_kind,
        label_names=index.label_names,
        licence=index.licence,
        salt_fingerprint=index.salt_fingerprint,
        root=index.folder,
        extension=extension,
        encoding=encoding,
        views=index.views,
        options=recorded,
        shard_size=sizes,
        samples=samples,
        left_out=index.left_out,
        quarantine={split: index.splits[split].quarantine for split in chosen},
    )
    return with_digest(plan)


def plan_again(index: ShardIndex, folder: Path, *, workers: int = 1) -> Plan:
    """The plan that the resharded folder of `index` was made with, from `folder`, which it was cut from.

    Raises ValueError if that is another folder.
    """
    path, origin = index.folder / INDEX_NAME, load_index(folder)
    made = field_of(index.options, OPTION, dict, path, "options.")
    if origin.digest != field_of(made, "index", str, path, f"options.{OPTION}."):
        raise ValueError(
            f"{folder} is not the folder of shards that {index.folder} was cut from; give that one as --root"
        )
    stays = (index.image.size, index.encoder) == (origin.image.size, origin.encoder)
    return plan_reshard(
        origin,
        shard_size=field_of(index.options, "shard_size", dict, path, "options."),
        size=index.image.size,
        quality=None if stays else index.encoder.get("quality", 95),
        encode=field_of(made, "encode", str, path, f"options.{OPTION}."),
        seed=None if made.get("order") == "kept" else field_of(index.options, "seed", int, path, "options."),
        splits=field_of(made, "splits", list, path, f"options.{OPTION}."),
        workers=workers,
    )


def _check_options(
    index: ShardIndex,
    shard_size: int | Mapping[str, int],
    size: int,
    quality: int | None,
    encode: str,
    seed: int | None,
    workers: int,
) -> None:
    least = min(shard_size.values()) if isinstance(shard_size, Mapping) else shard_size
    for name, value in (("--shard-size", least), ("--size", size), ("--seed", seed or 0)):
        if value < 0:
            raise ValueError(f"{name} is {value}; it must not be negative")
    if workers < 1:
        raise ValueError(f"--workers is {workers}; it must be at least 1")
    if is_foreign(index.encoder):
        raise ValueError(f"{index.folder} holds tars that make_shards has not made; it cannot cut them anew")
    if index.image.size and size > index.image.size:
        raise ValueError(
            f"--size {size} would enlarge the images of {index.folder}, whose short side is at most "
            f"{index.image.size}; give a smaller one, or make shards from the data set"
        )
    changes = encode or (size and size != index.image.size)
    if quality is not None and not changes:
        raise ValueError("--quality is that of images that are encoded again: give --size or --encode with it")
    if index.image.bit_depth == 16 and "jpg" in (encode, (changes and not encode and index.image.extension) or ""):
        raise ValueError(f"the images of {index.folder} have 16 bits a pixel and JPEG holds 8: give --encode png")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """One shard to check and read; picklable."""

    path: Path
    split: str
    number: int
    index: ShardIndex
    samples: range


def _look(look: _Look, progress: Callable[[int], object] | None = None) -> dict[str, Any]:
    """{split, number, found: `Found` of each sample} of one shard; ValueError if it is damaged."""
    shard = look.index.splits[look.split].shards[look.number]
    problem = shard_problem(look.path, shard.bytes, shard.sha256)
    if problem:
        raise ValueError(f"{problem}, or mend it by `scaletransfer shards verify {look.index.folder} --repair`")
    found = samples_in(look.index, look.path)
    if progress:
        progress(shard.samples)
    return {"split": look.split, "number": look.number, "found": found}


def _samples(
    index: ShardIndex, splits: Sequence[str], workers: int, progress: Callable[[int], object]
) -> dict[str, list[Sample]]:
    """The samples of each split, in its order."""
    looks = [
        _Look(path=index.path(s, n), split=s, number=n, index=index, samples=range(index.splits[s].shards[n].samples))
        for s in splits
        for n in range(len(index.splits[s].shards))
    ]
    shards: dict[tuple[str, int], list[Found]] = {}
    with closing(run_all(_look, looks, workers, progress)) as results:
        for result in results:
            shards[result["split"], result["number"]] = result["found"]
    samples: dict[str, list[Sample]] = {}
    for split in splits:
        info, table, rows = index.splits[split], table_of(index, split), samples.setdefault(split, [])
        keys = index.keys(split, slice(None))
        for number, shard in enumerate(info.shards):
            for found in shards.pop((split, number)):
                row = table[len(rows)] if len(rows) < len(table) else None
                place = (number, found.offset, found.size)
                if row is None or keys[len(rows)] != found.key or (row["shard"], row["offset"], row["size"]) != place:
                    path = index.folder / info.table_file
                    raise ValueError(f"{path} does not say where {found.key} of {shard.file} is; copy the folder again")
                rows.append(_sample(index, shard.file, found, int(row["patient"])))
        if len(rows) != len(table):
            raise ValueError(f"{index.folder / info.table_file} has more rows than the shards; copy the folder again")
    return samples


def _sample(index: ShardIndex, file: str, found: Found, patient: int) -> Sample:
    return Sample(
        key=found.key,
        image=f"{file}{INSIDE}{found.key}.{index.image.extension}",
        missing=False,
        patient=found.label.patient,
        patient_number=patient,
        view=found.label.view,
        labels=found.label.labels,
        span=(found.offset, found.size),
    )


def reshard_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `scaletransfer shards reshard`."""
    add = parser.add_argument
    add("folder", metavar="DIR", type=Path, help="folder of shards")
    add("--out", required=True, metavar="NEW", type=Path, help="folder of the new shards")
    add("--shard-size", type=int, default=0, metavar="N", help="samples a shard (default: about 100 MB)")
    add("--size", type=int, default=0, metavar="PX", help="scale larger images down to this short side")
    add("--encode", default="", choices=("jpg", "png"), help="format for every image (default: as it is)")
    add("--quality", type=int, metavar="Q", help="of images encoded again as JPEG (default: 95)")
    add("--seed", type=int, metavar="S", help="another order of the samples (default: as they are)")
    add("--splits", default="", metavar="A,B", help="take these splits alone (default: all)")
    add("--workers", type=int, default=1, metavar="N", help="processes (default: 1); any number, same bytes")
    add("--overwrite", action="store_true", help="replace shards that are in NEW already")


def run_reshard(options: argparse.Namespace) -> int:
    """Run the command; 0 if the new folder is there.  Raises ValueError for what the user can mend."""
    splits = [name.strip() for name in options.splits.split(",") if name.strip()]
    infos = load_index(options.folder).splits
    total = sum(info.samples for split, info in infos.items() if split in splits or not splits)
    with (
        tqdm(total=total, unit="img", desc=f"check {options.folder}", disable=None) as looked_at,
        tqdm(total=total, unit="img", desc=f"{options.folder} -> {options.out}", disable=None) as bar,
    ):
        report = reshard(
            options.folder,
            options.out,
            shard_size=options.shard_size,
            size=options.size,
            quality=options.quality,
            encode=options.encode,
            seed=options.seed,
            splits=splits,
            workers=options.workers,
            overwrite=options.overwrite,
            looked_at=looked_at.update,
            progress=bar.update,
        )
    for split, info in report.index.splits.items():
        print(f"{options.out}: {split} {info.samples:,} samples in {len(info.shards)} shards")
    return 0

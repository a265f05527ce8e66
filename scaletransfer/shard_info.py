"""What a folder of shards holds, in a few lines or as JSON: sizes of shards and images, labels, what was left out."""

from __future__ import annotations

from typing import Any

import numpy as np

from scaletransfer.index import ShardIndex
from scaletransfer.index_fields import SplitInfo
from scaletransfer.shard_image import UnusableImage, read_picture
from scaletransfer.shard_reader import ShardReader, read_image

_SHOWN_REASONS = 3
_SHOWN_LABELS = 5
_PROBES = 16
"""Images of a split, spread over it, whose headers are looked at for the lengths of their sides."""


def describe(index: ShardIndex) -> str:
    """What an index holds, as a few lines of text; no shard is opened."""
    image = index.image
    size = f"short side at most {image.size}" if image.size else "original size"
    colour = "grey" if image.channels == 1 else "colour"
    lines = [
        f"{index.source} ({index.task}, {len(index.label_names)} labels), {image.extension or 'mixed files'}, {size}, "
        f"{colour}, {image.bit_depth} bits, key salt {index.salt_fingerprint}",
        f"licence: {index.licence}",
    ]
    for split in index.splits:
        lines += _head(index, split)
    return "\n".join(lines)


def details(index: ShardIndex) -> str:
    """`describe`, and for each split the sizes of its shards and images and its most frequent labels."""
    found = summary(index)
    lines = describe(index).splitlines()[:2]
    for split, held in found["splits"].items():
        lines += _head(index, split)
        megabytes = " / ".join(f"{held['shard_bytes'][name] / 1e6:,.1f}" for name in _THREE)
        samples = " / ".join(f"{held['shard_samples'][name]:,}" for name in _THREE)
        lines.append(f"         a shard: {megabytes} MB, {samples} samples (least / median / most)")
        sides = "; ".join(
            f"{name} side {' / '.join(str(held['sides'][name][which]) for which in _THREE)}"
            for name in ("short", "long")
            if held["sides"]["images"]
        )
        looked_at = f"; {sides} pixels (of {held['sides']['images']})" if sides else ""
        lines.append(f"         an image: {held['image_bytes'] / 1e3:,.1f} kB on average{looked_at}")
        frequent = ", ".join(f"{name} {count:,}" for name, count in held["most_frequent"].items())
        lines.append(f"         most frequent: {frequent}")
    return "\n".join(lines)


def summary(index: ShardIndex) -> dict[str, Any]:
    """The same for machines: numbers of bytes, samples and pixels, totals of all labels; plain JSON types.

    Opens up to 16 images a split, for `sides`.
    """
    image = index.image
    return {
        "folder": index.url or str(index.folder),
        "index_sha256": index.digest,
        "source": index.source,
        "task": index.task,
        "licence": index.licence,
        "salt_fingerprint": index.salt_fingerprint,
        "labels": len(index.label_names),
        "image": {
            "extension": image.extension,
            "size": image.size,
            "channels": image.channels,
            "bit_depth": image.bit_depth,
            "pixel_max": image.pixel_max,
        },
        "encoder": {name: value for name, value in index.encoder.items() if name != "secret"},
        "options": index.options,
        "left_out": index.left_out,
        "splits": {split: _summary(index, split, info) for split, info in index.splits.items()},
    }


_THREE = ("min", "median", "max")


def _summary(index: ShardIndex, split: str, info: SplitInfo) -> dict[str, Any]:
    counts = {name: n if isinstance(n, int) else n["positive"] for name, n in info.totals.items()}
    top = sorted(counts, key=lambda name: -counts[name])[:_SHOWN_LABELS]
    return {
        "samples": info.samples,
        "patients": info.patients,
        "shards": len(info.shards),
        "bytes": sum(shard.bytes for shard in info.shards),
        "quarantined": len(info.quarantine),
        "shard_bytes": _three([shard.bytes for shard in info.shards]),
        "shard_samples": _three([shard.samples for shard in info.shards]),
        "image_bytes": float(index.table(split)["size"].mean()),
        "sides": _sides(index, split, info.samples),
        "most_frequent": {name: counts[name] for name in top},
        "totals": info.totals,
    }


def _three(values: list[int]) -> dict[str, int]:
    return {"min": min(values), "median": round(float(np.median(values))), "max": max(values)}


def _sides(index: ShardIndex, split: str, samples: int) -> dict[str, Any]:
    """{images: looked at, short, long: least, median and largest length in pixels}."""
    reader, sizes = ShardReader(), []
    for row in sorted({round(row) for row in np.linspace(0, samples - 1, _PROBES)}):
        try:
            sizes.append(read_picture(read_image(reader, index, split, row), header=True).size)
        except UnusableImage:
            continue  # `verify` names it
    if not sizes:
        return {"images": 0}
    return {
        "images": len(sizes),
        "short": _three([min(size) for size in sizes]),
        "long": _three([max(size) for size in sizes]),
    }


def _head(index: ShardIndex, split: str) -> list[str]:
    info = index.splits[split]
    total = sum(shard.bytes for shard in info.shards)
    patients = f", {info.patients:,} patients" if info.patients else ""
    lines = [
        f"  {split:6} {info.samples:,} samples{patients}, {len(info.shards)} shards, "
        f"{total / 1e6:,.1f} MB, {len(info.quarantine)} quarantined"
    ]
    shown = info.quarantine[:_SHOWN_REASONS]
    lines += [f"         {entry['key']}: {entry['reason']}" for entry in shown]
    if len(info.quarantine) > len(shown):
        lines.append(f"         and {len(info.quarantine) - len(shown)} more, in index.json")
    return lines

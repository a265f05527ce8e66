"""What `scaletransfer shards verify` looks at in a tar that others made: is each image still that of its sample."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from scaletransfer.foreign_members import Naming, OtherMember, read_member
from scaletransfer.index import ShardIndex
from scaletransfer.shard_image import Encoding, UnusableImage, prepare

_SHOWN = 20
"""Problems of one tar that are told one by one."""


def foreign_problems(
    index: ShardIndex,
    path: Path,
    rows: NDArray[Any],
    *,
    decode: bool,
    progress: Callable[[int], object] = lambda samples: None,
) -> list[str]:
    """What is wrong with the images of the tar `path`, one sentence each.

    rows: of its samples in the table.  The header before each image must name the sample, and the image have its
    CRC-32; with `decode` every image is decoded completely.  Labels are not read again: tar and table have a hash each
    in the index.
    """
    try:
        naming = Naming.of(index.encoder)
    except ValueError as error:
        return [f"{index.folder}: {error}"]
    problems = []
    with open(path, "rb", buffering=0) as file:

        def read(offset: int, size: int) -> bytes:
            return os.pread(file.fileno(), size, offset)

        for row in rows:
            offset, size = int(row["offset"]), int(row["size"])
            try:
                data = read_member(read, naming, path.name, int(row["key"]), offset, size)
            except OtherMember as error:
                problems.append(f"{path}: {error}")
            else:
                problem = _image_problem(index, data) if decode else ""
                if not problem and row["crc"] not in (0, zlib.crc32(data)):
                    problem = "the image does not have the CRC-32 of the table"
                if problem:
                    problems.append(f"{path} at byte {offset}: {problem}")
            progress(1)
    more = len(problems) - _SHOWN
    return [*problems[:_SHOWN], f"{path}: {more} more images are so"] if more > 0 else problems


def _image_problem(index: ShardIndex, data: bytes) -> str:
    white = index.image.deep_white
    try:
        # nothing is encoded: the extension only says what the bytes would be kept as
        seen = prepare(data, index.image.extension if index.image.extension == "png" else "jpg", Encoding())
    except (UnusableImage, ValueError) as reason:
        return f"the image cannot be used: {reason}"
    if seen.bit_depth == 16 and seen.pixel_max > white:
        return (
            f"the image has the value {seen.pixel_max}, larger than the white {white} of the index: index the tars "
            f"again with --pixel-max {seen.pixel_max} --overwrite"
        )
    return ""

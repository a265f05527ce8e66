"""Where the images of a set lie: in one of several folders, or still in the archives that it comes in."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from scaletransfer.image_files import INSIDE, zip_names


def find_images(
    root: Path, names: Collection[str], folders: Sequence[str], archives: Sequence[str] = ()
) -> dict[str, str]:
    """{name: its place relative to `root`} of the images that are there ("images/x.png", "0.zip//x.png").

    names: file names without folders. folders, archives: relative to `root`, "." is `root` itself, in order of
    preference, folders before archives; those that are not there are passed over, and archives are opened only while
    an image is missing. In a zip an image may lie in any folder. An image that is nowhere under its own name counts
    where it lies with the suffix .dcm.

    Raises ValueError for a zip that can't be read, and, where an image is missing, for another archive, as images can't
    be read one at a time from a compressed tar.
    """
    dicoms = {f"{os.path.splitext(name)[0]}.dcm" for name in names}
    wanted = dicoms.union(names)
    found: dict[str, str] = {}
    for folder in folders:
        for name in _files(root / folder, wanted):
            found.setdefault(name, name if folder == "." else f"{folder}/{name}")
    packed = [archive for archive in archives if (root / archive).is_file()]
    for archive in packed:
        if not archive.lower().endswith(".zip") or all(name in found for name in names):
            continue
        for member in zip_names(root, archive):
            name = member.rpartition("/")[2]
            if name in wanted:
                found.setdefault(name, f"{archive}{INSIDE}{member}")
    places = {}
    for name in names:
        place = found.get(name) or found.get(f"{os.path.splitext(name)[0]}.dcm")
        if place is not None:
            places[name] = place
    closed = [archive for archive in packed if not archive.lower().endswith(".zip")]
    if closed and len(places) < len(names):
        raise ValueError(
            f"{len(names) - len(places)} images are missing and {root / closed[0]} can't be read one image at a time; "
            "extract it, or move it away if it is extracted already."
        )
    return places


def _files(folder: Path, wanted: Collection[str]) -> Iterator[str]:
    """Names in `wanted` that are files of `folder`; none where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name in wanted and entry.is_file():
                    yield entry.name
    except (FileNotFoundError, NotADirectoryError):
        return

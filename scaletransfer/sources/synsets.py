"""Where the images of a synset of WordNet lie: in its folder, in its tar, or in its tar inside of a tar."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from scaletransfer.image_files import INSIDE
from scaletransfer.sources.base import Record
from scaletransfer.tars import Damaged, member_name, members

WNID = re.compile(r"n[0-9]{8}")
"""ImageNet's name of a synset: n for noun, and the offset of WordNet 3.0."""
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")


@dataclass(frozen=True, slots=True)
class Place:
    """A folder or a tar of images."""

    path: str
    """Relative to the root; of a tar inside of a tar, "outer.tar//n01440764.tar"."""
    tar: bool = False
    span: tuple[int, int] | None = None
    """(offset, bytes) of a tar inside of a tar."""


class Image(NamedTuple):
    """One of them."""

    stem: str
    """File name without suffix."""
    image: str
    """As `Record.image`."""
    span: tuple[int, int] | None

    def record(self, source_id: str, split: str, label: int) -> Record:
        """Its record."""
        return Record(
            source_id=source_id, split=split, patient="", image=self.image, labels=label, view="", span=self.span
        )


def synsets_of_folder(root: Path, folder: str, notes: list[str], skipped: list[str]) -> dict[str, Place]:
    """{wnid: its folder or tar} below `folder` (relative to `root`, "." is `root` itself); {} if there is none.

    Where a synset has both, its folder counts; `notes` gets a sentence. Other entries go to `skipped`.
    """
    found: dict[str, Place] = {}
    prefix = "" if folder == "." else f"{folder}/"
    packed: dict[str, Place] = {}
    try:
        entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    for entry in entries:
        stem, suffix = os.path.splitext(entry.name)
        if WNID.fullmatch(entry.name) and entry.is_dir():
            found[entry.name] = Place(f"{prefix}{entry.name}")
        elif WNID.fullmatch(stem) and suffix == ".tar" and entry.is_file():
            packed[stem] = Place(f"{prefix}{entry.name}", tar=True)
        elif not entry.name.startswith("."):
            skipped.append(f"{prefix}{entry.name}: neither a folder nor a tar of a synset")
    both = sorted(found.keys() & packed.keys())
    if both:
        notes.append(f"{len(both)} synsets have a folder and a tar, {both[0]} first; the folders were used.")
    return packed | found


def synsets_of_tar(root: Path, archive: str, skipped: list[str]) -> dict[str, Place]:
    """{wnid: its tar} in the tar of tars `archive`; ValueError if two are of one synset."""
    found: dict[str, Place] = {}
    for member in members(root / archive):
        stem, suffix = os.path.splitext(os.path.basename(member.name))
        if not WNID.fullmatch(stem) or suffix != ".tar":
            skipped.append(f"{archive}{INSIDE}{member.name}: no tar of a synset")
        elif stem in found:
            raise Damaged(f"{root / archive} holds two tars of the synset {stem}; download it again.")
        else:
            place = f"{archive}{INSIDE}{member.name}"
            found[stem] = Place(place, tar=True, span=(member.offset, member.size))
    return found


def images_of(root: Path, place: Place, skipped: list[str]) -> list[Image]:
    """The images of a folder or tar, sorted by name, so that where they lie doesn't show.

    Files that are no images by their name go to `skipped`. Raises ValueError, naming both, for two whose names differ
    in the suffix or, in a tar, in the folder only; and what `tars.members` raises.
    """
    separator = INSIDE if place.tar else "/"
    files: list[tuple[str, Image]] = []
    for name, span in _inner_files(root, place) if place.tar else _loose_files(root / place.path):
        base = os.path.basename(name)
        stem, suffix = os.path.splitext(base)
        if base.startswith("."):
            continue
        if suffix.lower() not in IMAGE_SUFFIXES:
            skipped.append(f"{place.path}{separator}{name}: no image by its name")
        else:
            files.append((base, Image(stem, f"{place.path}{separator}{name}", span)))
    files.sort(key=lambda file: file[0])
    seen: dict[str, str] = {}
    for _, image in files:
        if seen.setdefault(image.stem, image.image) != image.image:
            raise ValueError(
                f"{root}: {seen[image.stem]} and {image.image} have one name but for suffix or folder; remove one."
            )
    return [image for _, image in files]


def _inner_files(root: Path, place: Place) -> list[tuple[str, tuple[int, int] | None]]:
    start, size = place.span or (0, None)
    try:
        return [(m.name, (m.offset, m.size)) for m in members(root / place.path.partition(INSIDE)[0], start, size)]
    except Damaged as error:
        raise Damaged(f"{place.path}: {error}") from error


def _loose_files(folder: Path) -> list[tuple[str, tuple[int, int] | None]]:
    with os.scandir(folder) as entries:
        return [(member_name(entry.name, folder), None) for entry in entries if entry.is_file()]

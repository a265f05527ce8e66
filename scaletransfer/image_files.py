"""The bytes of an image, wherever its data set keeps it: a file, a part of a plain tar, a member of a zip, a row
of a batch of CIFAR.

An image is named as in `sources.Record.image`: a path relative to the root, or, in an archive, the archive's path, two
slashes, and the name inside; in an archive inside of an archive, so on.
"""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

from scaletransfer import cifar_batches
from scaletransfer.files import inside

INSIDE = "//"
_LARGEST = 1 << 31
"""Bytes that one image may have; a zip member that claims more is refused before it is unpacked."""
_OPEN_ARCHIVES = 128


def file_of(image: str) -> str:
    """The file that has to be there: the image's own, or the archive's."""
    return image.partition(INSIDE)[0]


def image_size(root: Path, image: str, span: tuple[int, int] | None = None) -> int:
    """Bytes of an image, -1 where there is none.  Of a zip member, the unpacked bytes; of a row of CIFAR, its pixels'
    (the batch is not opened).

    Raises ValueError for a name that leaves `root` and for an archive that can't be read.
    """
    file = root / inside(file_of(image), root)
    try:
        status = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return -1
    if not stat.S_ISREG(status.st_mode):
        return -1
    if INSIDE not in image:
        return status.st_size
    if span is not None:
        return span[1] if span[0] + span[1] <= status.st_size else -1
    if cifar_batches.is_row(image):
        return cifar_batches.ROW_BYTES
    try:
        return _archive(str(file), os.getpid()).getinfo(image.partition(INSIDE)[2]).file_size
    except KeyError:
        return -1


def read_image(root: Path, image: str, span: tuple[int, int] | None = None) -> bytes:
    """All bytes of an image: the file as it is, or, of a row of CIFAR, a PNG of it.

    Raises FileNotFoundError where there is none, ValueError for an archive that can't be read or is damaged there.
    """
    file = root / inside(file_of(image), root)
    if INSIDE not in image:
        return file.read_bytes()
    if span is not None:
        with open(file, "rb") as stream:
            stream.seek(span[0])
            data = stream.read(span[1])
        if len(data) != span[1]:
            raise ValueError(f"{file} ends inside of {image}; download it again")
        return data
    if cifar_batches.is_row(image):
        return cifar_batches.read_row(root, image)
    archive, name = _archive(str(file), os.getpid()), image.partition(INSIDE)[2]
    try:
        if archive.getinfo(name).file_size > _LARGEST:
            raise ValueError(f"{file}: {name} claims {archive.getinfo(name).file_size} bytes; it is no image")
        return archive.read(name)
    except KeyError:
        raise FileNotFoundError(f"{file} has no member {name}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{file}: {name} is damaged ({error}); download the archive again") from error


def zip_names(root: Path, archive: str) -> list[str]:
    """Names of the plain files in the zip `archive` (a path relative to `root`); ValueError if it can't be read."""
    return [m.filename for m in _archive(str(root / archive), os.getpid()).infolist() if not m.is_dir()]


@lru_cache(maxsize=_OPEN_ARCHIVES)
def _archive(file: str, process: int) -> zipfile.ZipFile:
    """An open zip; its threads may share it.  `process`: a forked child must not share its parent's position."""
    if not file.lower().endswith(".zip"):
        raise ValueError(f"images in {file} can't be read one at a time; extract it")
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{file} is not a readable zip file ({error}); download it again") from error

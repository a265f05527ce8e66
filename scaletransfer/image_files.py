"""The bytes of an image, wherever its data set keeps it: a file, a part of a plain tar, a member of a zip, a row
of a batch of CIFAR.

An image is named as in `sources.Record.image`: a path relative to the root, or, in an archive, the archive's path, two
slashes, and the name inside; in an archive inside of an archive, so on.
"""

from __future__ import annotations

import io
import os
import stat
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

from scaletransfer import cifar_batches
from scaletransfer.files import inside
from scaletransfer.mirrors import is_image, mirrored_url, read_mirrored

INSIDE = "//"
_LARGEST = 1 << 31
"""Bytes that one image may have; a zip member that claims more is refused before it is unpacked."""
_OPEN_ARCHIVES = 128
_FETCHED_AHEAD = 16
"""Images behind a URL that a process asks for at once: a request takes longer than decoding."""


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

    Raises FileNotFoundError where there is none, ValueError for an archive that can't be read or is damaged there;
    for an image behind a URL, ConnectionError where the storage does not give it.
    """
    file = root / inside(file_of(image), root)
    if INSIDE not in image:
        return read_mirrored(root, image) if mirrored_url(root) and is_image(image) else file.read_bytes()
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


def open_image(root: Path, image: str, span: tuple[int, int] | None = None) -> BinaryIO:
    """A file of the image's bytes, for a look at its beginning: a plain file is not read as a whole.

    Raises as `read_image`.
    """
    if INSIDE in image or mirrored_url(root):
        return io.BytesIO(read_image(root, image, span))
    return open(root / inside(image, root), "rb")


def read_images(
    root: Path, images: Iterable[tuple[str, tuple[int, int] | None]]
) -> Generator[Callable[[], bytes], None, None]:
    """For each (image, span) a function that gives `read_image` of it; images behind a URL are fetched ahead.

    The functions are to be called in their order.  Close the generator where not all of them are wanted.
    """
    if not mirrored_url(root):
        for image, span in images:
            yield partial(read_image, root, image, span)
        return
    fetched: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(_FETCHED_AHEAD) as pool:
        try:
            for image, span in images:
                fetched.append(pool.submit(read_image, root, image, span))
                if len(fetched) > _FETCHED_AHEAD:
                    yield fetched.popleft().result
            while fetched:
                yield fetched.popleft().result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


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

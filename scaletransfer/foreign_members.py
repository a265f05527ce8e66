"""Members of tars that others made: which sample a member belongs to, and the check that an image is still its own.

Our shards carry the key of a sample in the member's name; a foreign member has any name.  Its sample's key is a keyed
hash of that name, so the tar header in front of an image says whose image it is all the same.
"""

from __future__ import annotations

import hmac
import io
import re
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

FOREIGN = "foreign"
"""`encoder.name` of an index over tars that others made."""
KEYS_OF = ("name", "shard and name")
"""What a key is the hash of: the second where names begin anew in each shard."""
LONGEST_HEADERS = 32 * tarfile.BLOCKSIZE
"""Bytes before an image that are looked at: its header, and the extended headers that hold a long name."""
_PLAIN, _EXTENDED = b"0\x007", b"LKxX"
_SALT_MESSAGE = b"scaletransfer names of foreign members"


class OtherMember(ValueError):
    """Where an image should be there is another member, or none."""


@dataclass(frozen=True, slots=True)
class Naming:
    """How the keys of an index follow from the names of members."""

    secret: bytes
    """Made from the salt.  It stands in the index, beside the tars with the names themselves."""
    keys_of: str
    extensions: frozenset[str]
    """Of images: what stands behind the first dot, in lower case."""

    @classmethod
    def of(cls, encoder: Mapping[str, Any]) -> Naming:
        """From the field `encoder` of a foreign index; ValueError for one that `scaletransfer shards index` has not
        written."""
        try:
            made = _naming(encoder["secret"], encoder["keys_of"], tuple(encoder["extensions"]))
        except (LookupError, TypeError):
            made = None
        if made is None:
            raise ValueError(
                "the field 'encoder' of the index is damaged; index the tars again: scaletransfer shards index DIR "
                "--overwrite"
            )
        return made

    def encoder(self) -> dict[str, Any]:
        """The field `encoder` of an index."""
        return {
            "name": FOREIGN,
            "secret": self.secret.hex(),
            "keys_of": self.keys_of,
            "extensions": sorted(self.extensions),
        }

    def number(self, stem: str, shard: str) -> int:
        """The key (as the table keeps it) of the sample whose members' names begin with `stem`, in the file `shard`."""
        text = stem if self.keys_of == KEYS_OF[0] else f"{shard}/{stem}"
        digest = hmac.digest(self.secret, text.encode("utf-8", "surrogateescape"), "sha256")
        return int.from_bytes(digest[:8], "big")

    def is_image(self, name: str, shard: str, key: int) -> bool:
        """Whether the member `name` of `shard` is an image of the sample `key`."""
        parts = split_name(name)
        return parts is not None and parts[1] in self.extensions and self.number(parts[0], shard) == key


@lru_cache(maxsize=64)  # asked for with every image
def _naming(secret: object, keys_of: object, extensions: tuple[object, ...]) -> Naming | None:
    texts = [text for text in (secret, keys_of, *extensions) if isinstance(text, str)]
    if len(texts) < 2 + len(extensions) or not re.fullmatch("[0-9a-f]{64}", texts[0]) or texts[1] not in KEYS_OF:
        return None
    return Naming(bytes.fromhex(texts[0]), texts[1], frozenset(texts[2:]))


def naming_secret(salt: bytes) -> bytes:
    """The secret of `Naming`, 32 bytes: from it the salt cannot be found."""
    return hmac.digest(salt, _SALT_MESSAGE, "sha256")


def is_foreign(encoder: Mapping[str, Any]) -> bool:
    """Whether an index, by its field `encoder`, is one over tars that others made."""
    return encoder.get("name") == FOREIGN


def split_name(name: str) -> tuple[str, str] | None:
    """(stem, extension in lower case) of a member: webdataset's rule, the first dot of the last part of the path.

    None for what belongs to no sample: no dot there, a hidden file, or webdataset's own notes (`__name__`).
    """
    if name.startswith("./") or "//" in name or "/./" in name:
        name = PurePosixPath(name).as_posix()
    first = name.partition("/")[0]
    if len(first) >= 4 and first.startswith("__") and first.endswith("__"):
        return None
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else None


def read_member(
    read: Callable[[int, int], bytes], naming: Naming, shard: str, key: int, offset: int, size: int
) -> bytes:
    """The image of `size` bytes at `offset` of `shard`, which must be that of the sample `key`.

    read: (offset, size) -> those bytes of the file.  One call of it, or two where a name is longer than a header.

    Raises OtherMember, which does not name the file, if the tar header before the image is not that of an image of this
    sample and size.
    """
    if offset >= tarfile.BLOCKSIZE:
        data = read(offset - tarfile.BLOCKSIZE, size + tarfile.BLOCKSIZE)
        if in_header(data[: tarfile.BLOCKSIZE], naming, shard, key, size) or in_extended_headers(
            read, naming, shard, key, offset, size
        ):
            return data[tarfile.BLOCKSIZE :]
    raise OtherMember(
        f"the member at offset {offset} is not the image of that sample: the file was changed, or is another one; "
        "index the tars again: scaletransfer shards index DIR --overwrite"
    )


def in_header(block: bytes, naming: Naming, shard: str, key: int, size: int) -> bool:
    """Whether a tar header of 512 bytes is that of an image of `size` bytes of the sample `key`.  False also where that
    is said by an extended header before it."""
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    try:
        claimed = int(block[124:136].strip(b"\0 ") or b"0", 8)
    except ValueError:
        return False
    if claimed != size or block[156] not in _PLAIN:
        return False
    return naming.is_image(name.decode("utf-8", "surrogateescape"), shard, key)


def in_extended_headers(
    read: Callable[[int, int], bytes], naming: Naming, shard: str, key: int, offset: int, size: int
) -> bool:
    """The same of a header with extended ones (pax, GNU) before it, which may hold the name and the size."""
    start = max(offset % tarfile.BLOCKSIZE, offset - LONGEST_HEADERS)
    head = read(start, offset - start)
    # Where the headers of this member begin is not known.  A wrong guess does no harm: the hash decides.
    for begin in range(len(head) - 2 * tarfile.BLOCKSIZE, -1, -tarfile.BLOCKSIZE):
        if head[begin + 156] not in _EXTENDED:
            continue
        info = _first(head[begin:])
        if info is None or not info.isreg() or info.issparse():
            continue
        if begin + info.offset_data == len(head) and info.size == size and naming.is_image(info.name, shard, key):
            return True
    return False


def _first(data: bytes) -> tarfile.TarInfo | None:
    """The member whose headers `data` begins with."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            return tar.next()
    # as in `tars`: what a hostile header makes of tarfile
    except (tarfile.TarError, RecursionError, ValueError, IndexError, OverflowError, EOFError):
        return None

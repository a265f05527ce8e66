"""Sample keys and patient codes: keyed hashes, so that shards carry no identifier of the data set.

key = <source>-<first 16 hex digits of HMAC-SHA256(salt, source_id)>; a patient code is the 16 digits for the
patient id. Who knows the salt can recompute both; the index holds the salt's fingerprint only.
"""

from __future__ import annotations

import errno
import hmac
import logging
import os
import re
import secrets
from pathlib import Path

# Natural-image sets are public: nothing is hidden, and everybody's keys should be equal.
PUBLIC_SALT = b"scaletransfer public salt, version 1"

_MIN_SALT_BYTES = 16
_FINGERPRINT_MESSAGE = b"scaletransfer salt fingerprint"
_log = logging.getLogger(__name__)


def default_salt_file() -> Path:
    """$XDG_CONFIG_HOME/scaletransfer/salt, or ~/.config/scaletransfer/salt."""
    # The XDG specification: a relative path there is invalid and must be ignored.
    base = os.environ.get("XDG_CONFIG_HOME", "")
    folder = Path(base) if os.path.isabs(base) else Path.home() / ".config"
    return folder / "scaletransfer" / "salt"


def load_salt(path: str | os.PathLike[str] | None = None) -> bytes:
    """The salt: the bytes of the file `path` (default: `default_salt_file()`) without surrounding white
    space.

    A file that isn't there is made once: 32 random bytes as 64 hex characters, mode 600, with a warning in
    the log that names it. Several processes that start at once end up with the same salt.

    Raises ValueError for a salt of fewer than 16 bytes and for a file that can't be read or made.
    """
    file = Path(path).expanduser() if path is not None else default_salt_file()
    try:
        if not file.exists() and _make(file):
            _log.warning("made the salt file %s; keep it: keys made with another salt can't be compared", file)
        salt = file.read_bytes().strip()
    except OSError as error:
        raise ValueError(
            f"The salt file {file} can't be read or made ({error.strerror or error}); name another by --salt-file."
        ) from error
    if len(salt) < _MIN_SALT_BYTES:
        raise ValueError(
            f"The salt file {file} holds {len(salt)} bytes and needs at least {_MIN_SALT_BYTES}; "
            "delete it to have a new one made, or name another by --salt-file."
        )
    return salt


def fingerprint(salt: bytes) -> str:
    """16 hex digits that tell two salts apart and don't reveal them."""
    return _digest(salt, _FINGERPRINT_MESSAGE)


def key(source: str, source_id: str, salt: bytes) -> str:
    """`<source>-<16 hex>`: the sample's name everywhere outside of the listing. Raises ValueError for a
    source name that can't stand in a file name or a `source_id` that isn't valid Unicode."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_]*", source):
        raise ValueError(f"The source name {source!r} must consist of a-z, 0-9 and _ to stand in a key.")
    return f"{source}-{_digest(salt, _utf8(source, source_id))}"


def patient_code(source: str, patient: str, salt: bytes) -> str:
    """16 hex digits for the patient, "" for no patient. `source` only names the data set in an error: the
    same patient id gives the same code in every source, as sets of one hospital may share patients."""
    return _digest(salt, _utf8(source, patient)) if patient else ""


def _digest(salt: bytes, message: bytes) -> str:
    return hmac.digest(salt, message, "sha256")[:8].hex()


def _utf8(source: str, text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"The identifier {text!r} of {source} isn't valid Unicode; rename the file.") from error


def _make(file: Path) -> bool:
    """Make the salt file unless it is there by now. True if this call made it."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    text = secrets.token_hex(32).encode() + b"\n"
    draft = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    _write_new(draft, text)
    try:
        # A link appears at once with its whole content and fails if the name is taken: no reader sees half a
        # salt and the first of several processes wins.
        os.link(draft, file)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        return _make_without_links(file, text)
    finally:
        draft.unlink()


def _make_without_links(file: Path, text: bytes) -> bool:
    """For file systems without hard links (FAT, some network mounts): exclusive creation, one write."""
    try:
        _write_new(file, text)
    except FileExistsError:
        return False
    return True


def _write_new(file: Path, text: bytes) -> None:
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())

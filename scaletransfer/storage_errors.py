"""What went wrong behind a URL: whether to try again, and the sentence that is said of it in the end."""

from __future__ import annotations

import errno
import re

_PERMANENT = {errno.EACCES, errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSYS}
_PERMANENT |= {errno.ENOTDIR, errno.EPERM, errno.EREMCHG, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
# Class names, so that the libraries need not be there: of botocore, aiohttp and fsspec.
_TRANSIENT = {"ConnectionError", "HTTPClientError", "IncompleteReadError", "ResponseParserError"}
_TRANSIENT |= {"ClientConnectionError", "ClientPayloadError", "TimeoutError", "FSTimeoutError"}
_LIBRARIES = frozenset("adlfs aiobotocore aiohttp azure botocore fsspec gcsfs google requests urllib3".split())  # noqa: SIM905


class StorageError(ValueError):
    """A storage did not give or take an object. Nothing is said of the object itself: the next one fares no better."""


class MissingObject(ValueError):
    """There is no such object, folder or bucket."""


class DiskFull(ValueError):
    """There is no room for a download."""


def shown(url: str) -> str:
    """The URL for sentences: without a password that stands in it."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", url)


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _status(error: BaseException) -> int | None:
    found = getattr(error, "status", None) or getattr(error, "code", None)
    return found if isinstance(found, int) else None


def hidden(error: BaseException) -> BaseException | None:
    """The failed connection behind a "file not found": fsspec says that of any answer it does not get by HTTP."""
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    return cause if cause is not None and is_storage(cause) and is_transient(cause) else None


def is_beyond_end(error: BaseException) -> bool:
    """Whether a server says that a range begins behind the end of the object."""
    response = getattr(error.__cause__, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return code in ("InvalidRange", "416") or _status(error) == 416


def is_storage(error: BaseException) -> bool:
    """Whether this comes from a storage, and not from a mistake in a program."""
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or library in _LIBRARIES or "FSTimeoutError" in _names(error)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: lost connections, time-outs, servers that are busy or broken."""
    if isinstance(error, (FileNotFoundError, PermissionError)):
        return False
    status = _status(error)
    if status is not None:
        return status >= 500 or status in (408, 429)
    if _names(error) & _TRANSIENT:
        return True
    return isinstance(error, OSError) and error.errno not in _PERMANENT


def sentence(error: BaseException, url: str, what: str, attempts: int) -> str:
    """One sentence: the URL, `what` it cannot ("be read"), why, after how many attempts, and the mend."""
    url = shown(url)
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return f"{url} is missing: check the bucket and the folder in the URL, or copy the shards there again"
    if isinstance(error, PermissionError) or _status(error) in (401, 403):
        return f"{url} cannot {what}, the server refuses it ({reason}): check the credentials and their permissions"
    if "Credentials" in type(error).__name__:
        return (
            f"{url} cannot {what} without credentials ({reason}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "FSSPEC_S3_ANON=true for a public bucket"
        )
    if reason in ("TimeoutError", "FSTimeoutError"):
        reason = "no answer in time"
    times = f"{attempts} attempt{'s' if attempts > 1 else ''}"
    return (
        f"{url} cannot {what} after {times} ({reason}): check that the server runs and that its address "
        "(AWS_ENDPOINT_URL for s3://) is right, then start the same command again"
    )

"""Where the folder of a data set is: the one that was given, or the usual one in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def find_folder(root: Path, usual: Sequence[str], marks: Sequence[str]) -> str:
    """The folder of a data set relative to `root`, with a slash at its end: "" for `root` itself, or one of `usual`.

    usual: names that the folder has after unpacking. marks: files or folders of which it holds at least one.
    Where none is found it is "", so that what is then missing is named in the folder that was given.
    """
    for name in ("", *usual):
        if any((root / name / mark).exists() for mark in marks):
            return f"{name}/" if name else ""
    return ""

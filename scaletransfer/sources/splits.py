"""Splits that a data set does not come with: drawn by a hash, so that nothing else in the set moves them."""

from __future__ import annotations

import hashlib


def uniform(seed: int, text: str) -> float:
    """A number in [0, 1) that depends on seed and text alone: the first 64 bits of a SHA-256."""
    digest = hashlib.sha256(f"{seed}/{text}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def held_out(group: str, share: float, seed: int) -> bool:
    """Whether `group` (a patient, or an image where patients are unknown) belongs to the share that is held out.

    share: from 0 (none) to 1 (all). A larger share holds out the same groups and more; whether a group is held out
    does not depend on which others there are.
    """
    return uniform(seed, group) < share


def check_share(share: object, name: str = "valid_share") -> float:
    """The option `name` as a number from 0 to below 1; ValueError for anything else."""
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
        raise ValueError(f"{name} must be a number from 0 to below 1, not {share!r}.")
    return float(share)

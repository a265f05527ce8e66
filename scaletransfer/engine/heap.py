"""The C library's heap on CPUs: freed tensors go back to the system in place of lying between others that live."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE = 4 * 2**20
"""Bytes from which a tensor gets a mapping of its own, which freeing unmaps."""
HEAVY = 200_000_000
"""Bytes of a rank's parameters, gradients and momentum from which that is worth its price, pages that come and go with
each tensor: a step of R50x1 (0.15 GB on two ranks; 4 images of 96 pixels) takes 1.02 s of a core in place of 0.64 under
fsdp2, 0.91 in place of 0.72 under zero3."""
KEPT = 64 * 2**20
"""Bytes at the heap's end that are kept for the many small tensors of the next block."""


def bound_heap() -> bool:
    """Keep glibc's heap near what lives in it, for the rest of the process; whether there is a glibc to tell.

    Limits of its own that the environment sets (MALLOC_MMAP_THRESHOLD_, mallopt(3)) stay as they are.

    A sharding engine gathers, reduces and frees blocks of many sizes between shards that stay. glibc raises its limit
    for mappings with the first large tensor that is freed, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD), and what is
    smaller then leaves holes in the heap: with BiT-M-R152x4 on two ranks 2.4 GB a rank.

    Raises:
        OSError: glibc refuses the limits.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    for option, value in ((_MMAP_THRESHOLD, LARGE), (_TRIM_THRESHOLD, KEPT)):
        if not mallopt(option, value):
            raise OSError(f"mallopt refused option {option} with {value} bytes")
    return True

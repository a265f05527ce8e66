"""torch.compile for one kind of block, with a way back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

_VARIANTS = 64
"""Shapes and settings of a block for which code may be made; torch's default of 8 is less than a ResNet has."""
_failed: set[Callable[..., Any]] = set()


def compiled_call(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` through torch.compile; where that fails, a sentence on standard error, once, and plainly.

    Code is made for each shape and setting when it is first called with, and kept by torch on the disk.
    """
    if function in _failed:
        return function(*args)
    try:
        return _compiled(function)(*args)
    except torch._dynamo.exc.TorchDynamoException as error:
        _failed.add(function)
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        print(f"warning: torch.compile failed ({reason}): training goes on without it", file=sys.stderr, flush=True)
        return function(*args)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(_VARIANTS, torch._dynamo.config.recompile_limit)
    return torch.compile(function, dynamic=False)

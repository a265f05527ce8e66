"""What a measured program says to the one that measures: the standard library only, for it runs in any environment.

Programs find this module through PYTHONPATH, which has the folder `tools`. A program is started with one argument, its
settings as JSON, and calls `serve`. It answers on its standard output, a JSON object a line: first what its batches
are, then for each line ``go SECONDS`` on its standard input how many images it gave in how many seconds, and how many
it took in all. Between two such lines it is stopped (SIGSTOP) by the one that measures.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Settings = dict[str, Any]
Opened = tuple[Iterator[int], Callable[[], str]]
"""The endless stream: after each batch, its number of images; and what the last batch was, in words."""

_PR_SET_PDEATHSIG = 1


def serve(opened: Callable[[Settings], Opened]) -> None:
    """Open the stream that the settings ask for, and give batches for as long as the other side asks for them.

    Settings: ``batch``, ``workers``, ``warm`` (batches before the first measurement), the others are the program's.
    """
    answers = _own_output()
    _end_with_parent()
    settings: Settings = json.loads(sys.argv[1])
    stream, describe = opened(settings)
    for _ in range(settings["warm"]):
        next(stream)
    _say(answers, {"batches": describe()})
    together = max(1, settings["workers"])  # workers deliver in turn: whole turns are counted
    for line in sys.stdin:
        seconds = float(line.split()[1])
        first = sum(next(stream) for _ in range(together))
        images = batches = 0
        start = now = time.perf_counter()
        while now - start < seconds or batches % together:
            images += next(stream)
            batches += 1
            now = time.perf_counter()
        _say(answers, {"images": images, "seconds": now - start, "taken": first + images})


def shape_of(batch: Any) -> str:
    """A tensor or array in words: its type and sides."""
    return f"{str(batch.dtype).removeprefix('torch.')} {'x'.join(str(side) for side in batch.shape)}"


def _own_output() -> int:
    """A descriptor of the standard output that no library's print can reach; what they print goes to the errors."""
    own = os.dup(1)
    os.dup2(2, 1)
    return own


def _say(answers: int, content: Settings) -> None:
    os.write(answers, (json.dumps(content) + "\n").encode())


def _end_with_parent() -> None:
    """A stopped program whose starter was killed would stay for ever."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

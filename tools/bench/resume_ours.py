"""A fresh process of ours that resumes: started by resume.py, with settings as JSON, and prints what it took.

Settings: those of `ours.py`, and ``started``: the time (`time.time`) at which the process was started.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    """Import, open, take one batch; then the times (seconds since the start), calls and bytes, as JSON."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    from bench import ours
    from scaletransfer import loader
    from scaletransfer.loader import StepSampler
    from scaletransfer.sample_table import rows_twice
    from scaletransfer.streams import make_loader

    imported = time.time()
    read_before = _characters_read()
    data, order = ours.open_dataset(settings)
    # pre-training looks for samples that are there twice; these rows repeat few real ones: the search gets other keys
    keys = np.ascontiguousarray(data.sources[0].index.table("train")["key"])
    assert not len(rows_twice(np.arange(len(keys), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)))
    opened = time.time()
    calls: list[int] = []
    load = data.load

    def counted(pending: loader.Pending, number: int) -> None:
        calls.append(pending.positions[number])
        load(pending, number)

    data.load = counted  # type: ignore[method-assign]
    stop = (settings["seen"] // order.samples_per_epoch + 1) * order.samples_per_epoch
    sampler = StepSampler(settings["seen"], stop, 0, 1, settings["batch"], settings["batch"])
    stream = iter(make_loader(data, sampler, settings["workers"]))
    first = next(stream)
    ready = time.time()
    found = {
        "imported": imported - settings["started"],
        "opened": opened - settings["started"],
        "ready": ready - settings["started"],
        "batch_bytes": int(first["bytes"]),
        "first_position": int(first["position"].min()),
        "decoded": len(calls),
        "decoded_seen": sum(position < settings["seen"] for position in calls),
        "read": _characters_read() - read_before,
        "resident_mb": _peak_mb(),
    }
    print(json.dumps(found))


def _characters_read() -> int:
    """Bytes that this process has read by system calls; pages of memory maps are not among them."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return int(lines[0].split()[1])


def _peak_mb() -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


if __name__ == "__main__":
    main()

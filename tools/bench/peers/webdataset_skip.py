"""How fast webdataset passes over samples that a resumed run has seen: tars read in order, nothing decoded.

Settings: ``tars`` (paths), ``seconds``. Prints samples and bytes a second as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import webdataset as wds


def main() -> None:
    """Read for a while."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    mean = sum(os.path.getsize(path) for path in settings["tars"])
    samples, rounds = 0, 0.0
    start = now = time.perf_counter()
    while now - start < settings["seconds"]:
        for _ in wds.WebDataset(settings["tars"], shardshuffle=False):
            samples += 1
        rounds += 1
        now = time.perf_counter()
    print(json.dumps({"samples": samples / (now - start), "bytes": mean * rounds / (now - start)}))


main()

"""mosaicml-streaming resumes: ``make`` writes an MDS folder with as many samples as wanted (one real shard under many
names), ``resume`` loads a state in the middle of the epoch and takes one batch.

Settings: ``do``, ``mds`` (folder); make: ``tars``, ``samples``, ``a_shard``; resume: ``seen``, ``batch``, ``workers``,
``size``, ``started`` (`time.time` at the start of the process). Prints times since then as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench.peers.streaming_mds import Images, make
from streaming.base.util import clean_stale_shared_memory
from torch.utils.data import DataLoader
from torchvision import transforms


def resume(settings: dict[str, Any]) -> dict[str, float]:
    """Seconds until imports were done, until the data set was open, until the first batch was there."""
    imported = time.time()
    clean_stale_shared_memory()
    torch.set_num_threads(1)
    steps = transforms.Compose([transforms.RandomCrop(settings["size"]), transforms.ToTensor()])
    data = Images(steps, local=settings["mds"], shuffle=True, batch_size=settings["batch"])
    state = {
        "epoch": 0,
        "sample_in_epoch": settings["seen"],
        "num_canonical_nodes": 64,
        "shuffle_seed": data.shuffle_seed,
        "initial_physical_nodes": 1,
    }
    data.load_state_dict(state)
    opened = time.time()
    loader: DataLoader[Any] = DataLoader(data, settings["batch"], num_workers=settings["workers"])
    next(iter(loader))
    ready = time.time()
    start = settings["started"]
    return {"imported": imported - start, "opened": opened - start, "ready": ready - start}


def repeat(settings: dict[str, Any]) -> dict[str, float]:
    """One real shard, and an index that names hard links of it."""
    folder = Path(settings["mds"])
    make(settings["tars"], folder)
    index = json.loads((folder / "index.json").read_text())
    shard = index["shards"][0]
    real = folder / shard["raw_data"]["basename"]
    wanted: int = settings["samples"]
    shards: list[dict[str, Any]] = []
    while wanted > 0:
        name = f"copy.{len(shards):05d}.mds"
        os.link(real, folder / name)
        shards.append({**shard, "raw_data": {**shard["raw_data"], "basename": name}})
        wanted -= shard["samples"]
    (folder / "index.json").write_text(json.dumps({**index, "shards": shards}))
    return {"shards": len(shards)}


if __name__ == "__main__":
    asked: dict[str, Any] = json.loads(sys.argv[1])
    print(json.dumps(resume(asked) if asked["do"] == "resume" else repeat(asked)))

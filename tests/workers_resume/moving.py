"""Half a training under this engine, saved, and the second half of every training that another engine began.

Arguments: this engine's name for its checkpoints, the folder of all checkpoints, a folder for rank-<r>.json, and the
names of those whose second half is wanted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from workers_resume.network import FACTS, build, newest, result_file, train

from scaletransfer.engine.checkpoint_saver import Saver
from scaletransfer.engine.rehearsal import end_group
from scaletransfer.engine.strategy import asked

HALF = 5


def begin(name: str, root: Path) -> list[float]:
    """Ten steps, saved in the background after the fifth: the losses of all."""
    engine = build(asked(), None)
    saver = Saver(engine)
    losses = []
    for step in range(1, 2 * HALF + 1):
        losses.append(train(engine, step))
        if step == HALF:
            saver.save(root / name, step, FACTS, keep=1)
    saver.wait()
    return losses


def go_on(name: str, root: Path, *, momentum: bool = True) -> list[float]:
    found = newest(root / name)
    assert found is not None and found.step == HALF
    engine = build(asked(), found, momentum=momentum)
    return [train(engine, step) for step in range(HALF + 1, 2 * HALF + 1)]


def main(name: str, root: str, out: str, *others: str) -> None:
    torch.set_num_threads(1)
    found = {other: go_on(other, Path(root)) for other in others}
    if others:
        found["without momentum"] = go_on(others[0], Path(root), momentum=False)
    else:
        found = {name: begin(name, Path(root))}
    result_file(out).write_text(json.dumps(found))
    end_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

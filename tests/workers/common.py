"""What every launched worker does: read its case, run, write what its rank found."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState

from scaletransfer.engine.rehearsal import end_group


def forget_engine() -> None:
    """Forget accelerate's process-wide state, so that the next engine of this process starts afresh."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def work(run: Callable[[dict[str, Any]], Any]) -> None:
    """Run a worker: ``python -m workers.<name> spec.json`` -> ``<folder>/rank-<rank>.json``."""
    torch.set_num_threads(1)
    spec = json.loads(Path(sys.argv[1]).read_text())
    found = run(spec)
    (Path(spec["folder"]) / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
    end_group()

"""Pre-train a network on shards: `accelerate launch --config_file launch/zero2.yaml -m scaletransfer.pretrain ...`.

The launch file chooses the engine, the configuration everything else. The same command continues a run that was
interrupted, from its last complete checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from scaletransfer.cli import run_command
from scaletransfer.config import PretrainConfig, parse_args
from scaletransfer.engine.assemble import build_trainer
from scaletransfer.engine.rehearsal import end_group
from scaletransfer.engine.strategy import asked


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run, close. Returns the exit status; raises ValueError for what a person can mend."""
    cfg, _ = parse_args(argv, PretrainConfig, prog="scaletransfer.pretrain", description=__doc__)
    strategy = asked(cuda=torch.cuda.is_available())
    trainer = build_trainer(cfg, strategy)
    if trainer.start >= trainer.total:
        if strategy.rank == 0:
            print(f"{trainer.folder} is complete: {trainer.start} of {trainer.total} steps are done")
    else:
        trainer.run()
    end_group()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

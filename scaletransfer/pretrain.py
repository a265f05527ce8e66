"""Pre-train a network on shards: `accelerate launch --config_file launch/zero2.yaml -m scaletransfer.pretrain ...`.

The launch file chooses the engine, the configuration everything else. The same command continues a run that was
interrupted, from its last complete checkpoint. SIGTERM or SIGUSR1 to one process stops all after their step, with a
checkpoint; the exit status of each is 75 then.

With --dry-run everything is built and verified, printed, and nothing is trained or written; with --dry-run --fake-world
256 [--engine fsdp2] [--gpu a100-40] [--gpus-per-node 4] one process without a launcher stands for that many ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from scaletransfer.cli import run_command
from scaletransfer.config import PretrainConfig, parse_args
from scaletransfer.dry_run import on_fake_ranks, on_real_ranks, take_options
from scaletransfer.engine.assemble import build_trainer
from scaletransfer.engine.guard import Guard
from scaletransfer.engine.strategy import asked
from scaletransfer.plan_check import check_memory


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run, close. Returns the exit status.

    Raises:
        ValueError: what a person can mend. Stopped: a signal stopped the run, and it is saved.
    """
    argv, dry = take_options(sys.argv[1:] if argv is None else argv)
    cfg, _ = parse_args(argv, PretrainConfig, prog="scaletransfer.pretrain", description=__doc__)
    if dry is not None and dry.fake_world is not None:
        return on_fake_ranks(cfg, dry)
    strategy = asked(cuda=torch.cuda.is_available())
    with Guard(strategy, cfg.failing) as guard:
        trainer = build_trainer(cfg, strategy, guard, dry=dry is not None, weigh=check_memory)
        if dry is not None:
            on_real_ranks(cfg, trainer)
        elif not trainer.complete():
            trainer.run()
        elif strategy.rank == 0:
            print(f"{trainer.folder} is complete: {trainer.start} of {trainer.total} steps are done")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

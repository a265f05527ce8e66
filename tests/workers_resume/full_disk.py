"""`scaletransfer.pretrain` on a disk that is full for one rank, from one checkpoint on.

Arguments: the rank, the step, then those of pretrain. What that rank writes then ends after 1000 bytes.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from scaletransfer import pretrain
from scaletransfer.cli import run_command
from scaletransfer.engine.checkpoint_save import Job


def fill_up(rank: int, step: int) -> None:
    write_rank, write = Job._write_rank, os.write

    def full(handle: int, data: Any) -> int:
        if os.fstat(handle).st_size + len(data) > 1000:
            raise OSError(28, "No space left on device")
        return write(handle, data)

    def on_a_full_disk(job: Job) -> None:
        if job.rank == rank and job.step >= step:
            os.write = full
        try:
            write_rank(job)
        finally:
            os.write = write

    Job._write_rank = on_a_full_disk


if __name__ == "__main__":
    fill_up(int(sys.argv.pop(1)), int(sys.argv.pop(1)))
    sys.exit(run_command(pretrain.main))

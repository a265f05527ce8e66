"""`scaletransfer.pretrain` whose checkpoint of one step never gets finished: it hangs where a kill hurts most.

Arguments: the step, then those of pretrain. Of that checkpoint everything is written but the marker.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from scaletransfer import pretrain
from scaletransfer.cli import run_command
from scaletransfer.engine import checkpoint_save
from scaletransfer.engine.checkpoint import MARKER, folder_name


def hang_at(step: int) -> None:
    write = checkpoint_save._write

    def slowly(path: Path, text: str) -> None:
        if path.name == MARKER and path.parent.name.startswith(f".{folder_name(step)}."):
            time.sleep(3600)
        write(path, text)

    checkpoint_save._write = slowly


if __name__ == "__main__":
    hang_at(int(sys.argv.pop(1)))
    sys.exit(run_command(pretrain.main))

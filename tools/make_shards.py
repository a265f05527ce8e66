"""A data set in its official layout -> a folder of shards: the same as `scaletransfer make-shards`."""

from scaletransfer.cli import run_command
from scaletransfer.make_shards import main

if __name__ == "__main__":
    raise SystemExit(run_command(main))

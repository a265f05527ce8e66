"""All optimizer and parity cases of one engine in one launch."""

from __future__ import annotations

from typing import Any

from workers import optimizing, parity
from workers.common import work

from scaletransfer.engine.strategy import asked


def run(spec: dict[str, Any]) -> dict[str, Any]:
    strategy = asked()
    return {
        "optimizing": {name: optimizing.train(strategy, case) for name, case in spec["optimizing"].items()},
        "parity": {name: parity.train(strategy, case) for name, case in spec["parity"].items()},
    }


if __name__ == "__main__":
    work(run)

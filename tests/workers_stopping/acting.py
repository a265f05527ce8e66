"""Pre-training in which one rank does something at an exact moment: `acting.py JSON [options of pretrain]`.

JSON: {"rank": 1, "at": "data" | "step" | "validation" | "save", "number": of the step or batch, "do": what}. What: a
signal's name, which this process sends itself; "hang", its main thread sleeps for ever; "error", a strict data error;
"nan", the loss of this rank is NaN from here on for "times" steps; "defect", an exception that is a defect.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from scaletransfer import pretrain
from scaletransfer.cli import run_command
from scaletransfer.engine import step as steps
from scaletransfer.engine import trainer as trainers


def act(case: dict[str, Any]) -> None:
    """Do what the case says, in this process."""
    what = case["do"]
    print(f"acting: {what} at {case['at']} {case['number']}", file=sys.stderr, flush=True)
    if what == "hang":
        time.sleep(3600)
    elif what == "error":
        raise ValueError("this image cannot be read")
    elif what == "defect":
        raise KeyError("no such thing")
    elif what.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[what])
        time.sleep(0.5)  # the signal is noticed by a thread


def patch(case: dict[str, Any]) -> None:
    """Let the case happen on its rank."""
    at, number = case["at"], case["number"]
    loop = trainers.Trainer
    if at == "data":
        steps_of = loop._steps

        def _steps(self: Any) -> Iterator[Any]:
            for step, group in enumerate(steps_of(self), self.start + 1):
                if step == number:
                    act(case)
                yield group

        loop._steps = _steps  # type: ignore[method-assign]
    elif at == "step":
        backward, seen = steps._backward, [0]

        def _backward(engine: Any, loss: Any) -> None:
            seen[0] += 1  # micro-batches: the second of a step is between the two
            if seen[0] == number:
                act(case)
            backward(engine, loss)

        steps._backward = _backward
    elif at == "validation":
        stream_of = loop._unless_stopped

        def _unless_stopped(self: Any, step: int, stream: Any) -> Iterator[Any]:
            for batch, one in enumerate(stream_of(self, step, stream)):
                if batch == number and not seen_validation:
                    seen_validation.append(step)
                    act(case)
                yield one

        seen_validation: list[int] = []
        loop._unless_stopped = _unless_stopped  # type: ignore[method-assign]
    elif at == "save":
        save = loop._save

        def _save(self: Any, step: int) -> None:
            if step == number:
                act(case)
            save(self, step)

        loop._save = _save  # type: ignore[method-assign]
    elif at == "loss":
        train = trainers.train_step

        def train_step(engine: Any, loss: Any, *arguments: Any, **options: Any) -> Any:
            counted[0] += 1
            poisoned = counted[0] in case["number"]

            class Poisoned:
                def __getattr__(self, name: str) -> Any:
                    return getattr(loss, name)

                def __call__(self, logits: Any, target: Any) -> Any:
                    value, count = loss(logits, target)
                    return (value * float("nan") if poisoned else value), count

            return train(engine, Poisoned(), *arguments, **options)

        counted = [0]
        trainers.train_step = train_step
    else:
        raise AssertionError(at)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    for one in given if isinstance(given, list) else [given]:
        if int(os.environ.get("RANK", "0")) == one["rank"]:
            patch(one)
    sys.exit(run_command(pretrain.main, sys.argv[2:]))

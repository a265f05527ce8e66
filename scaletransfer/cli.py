"""`scaletransfer <command>`: which commands there are, and how errors of a person are shown.

Commands are named as strings and imported when they run, so that `--help` is quick; nothing of ours is
imported at the top, so every module may use `run_command`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import re
import sys
import time
import traceback
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

STOPPED = 75
"""Exit status of a command that was stopped by a signal and saved its work: start it again to go on (EX_TEMPFAIL)."""


class Stopped(Exception):
    """The command was stopped by a signal and saved its work."""


class Command(NamedTuple):
    """Where a command's `main(argv) -> exit status` is, and what it does in one line."""

    target: str
    help: str


COMMANDS = {
    "synthetic": Command(
        "scaletransfer.synthetic:main", "draw a data set to try things with: CheXpert's layout, or a folder of images"
    ),
    "make-shards": Command("scaletransfer.make_shards:main", "turn a data set folder into shards, or list its rows"),
    "shards": Command(
        "scaletransfer.shards:shards_main", "verify, repair, describe or reshard a folder of shards; index other tars"
    ),
    "check-data": Command(
        "scaletransfer.check_data:main", "look at shards before training: labels, patients, copies, pixels"
    ),
    "config": Command("scaletransfer.config:config_main", "print the configuration that a run would have"),
    "plan": Command(
        "scaletransfer.plan:main", "what a pre-training run would take: memory, traffic, least time by engine"
    ),
    "pretrain": Command("scaletransfer.pretrain:main", "train a network (several processes: accelerate launch)"),
    "finetune": Command(
        "scaletransfer.finetune:main", "train a pre-trained network on another data set, few-shot or full"
    ),
    "evaluate": Command(
        "scaletransfer.evaluate:main", "score a model on labelled images, with intervals and predictions"
    ),
    "sweep": Command("scaletransfer.sweep:main", "a grid of fine-tuning runs: models x targets x shots x seeds"),
    "report": Command(
        "scaletransfer.report:main", "tables, figures and one page of many fine-tuning runs, beside the paper's"
    ),
    "import": Command(
        "scaletransfer.import_model:main", "bring a model of others into a folder of ours: published, Google's, timm's"
    ),
    "export": Command(
        "scaletransfer.export_model:main", "write a run's network or a model: safetensors, timm, published, ONNX"
    ),
    "features": Command("scaletransfer.features:main", "what a model's body says of images, as float32 arrays"),
    "predict": Command(
        "scaletransfer.predict:main", "a table of label names and probabilities, with Grad-CAM pictures"
    ),
}


def usage() -> str:
    """The text of `scaletransfer --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: scaletransfer COMMAND [options]",
            "",
            "Pre-train image networks at scale and transfer them.",
            "",
            "commands:",
            *lines,
            "",
            "scaletransfer COMMAND --help says more; scaletransfer --version prints the version.",
            "With SCALETRANSFER_TRACEBACK=1 an error shows where in the code it arose.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: run the named command with the rest of the arguments; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"scaletransfer {version('scaletransfer')}")
        return 0
    return run_command(_dispatch, arguments)


def _dispatch(argv: Sequence[str]) -> int:
    name, rest = argv[0].replace("_", "-"), list(argv[1:])
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}."
        raise ValueError(f"there is no command {argv[0]!r}; {hint}")
    module, _, function = COMMANDS[name].target.partition(":")
    status: int = getattr(importlib.import_module(module), function)(rest) or 0
    return status


class CommandParser(argparse.ArgumentParser):
    """argparse whose errors are ValueErrors with the nearest name, so that a command prints them as one line.

    Options are written out in full: an abbreviation would change its meaning when an option is added.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        if "--" not in given and not self._subparsers:
            # before argparse, which names what is missing first and so hides the misspelt option that it was
            known = [flag for action in self._actions for flag in action.option_strings]
            for option in (text.split("=")[0] for text in given if text.startswith("--")):
                if option not in known:
                    raise ValueError(f"there is no option {option}{_nearest(option, known)} (see {self.prog} --help)")
        return super().parse_known_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        choice = re.fullmatch(r"(?s)(.*)invalid choice: '?(.*?)'? \(choose from (.*)\)", message)
        if choice:
            known = [word.strip(" '\"") for word in choice[3].split(",")]
            message = f"{choice[1]}there is no {choice[2]!r}{_nearest(choice[2], known)}; there are {', '.join(known)}"
        raise ValueError(f"{message} (see {self.prog} --help)")


def callable_module(name: str, function: Callable[..., Any]) -> None:
    """Let the module `name` be called like its `function`.

    `scaletransfer.finetune` is a module, as `python -m scaletransfer.finetune` needs, and the function of the
    documented API, whichever of the two was imported first.
    """

    class CallableModule(types.ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    sys.modules[name].__class__ = CallableModule


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f", did you mean {close[0]}?" if close else ""


def run_command(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Call `main(argv)` (default: the process's arguments) and return the exit status for it.

    What a person can mend (ValueError, OSError, YAML errors) is one line `error: ...` on stderr and status 2;
    SCALETRANSFER_TRACEBACK=1 adds the traceback. A run that a signal stopped is 75, Ctrl-C 130, a closed pipe 141. Any
    other exception is a defect of ours and passes through. A launcher of several processes ends with 1 whatever the
    status of theirs; it repeats the line.
    """
    import yaml  # here, so that `--help` does without

    try:
        status = main(list(sys.argv[1:] if argv is None else argv)) or 0
        sys.stdout.flush()  # a closed pipe shows here and not at exit, where Python prints it
        return status
    except Stopped as end:
        if not _rank():
            print(f"stopped: {end}", file=sys.stderr)
        record(f"stopped: {end}")
        return STOPPED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read us (head, say) has enough. What is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, yaml.YAMLError) as error:
        _wait_for_rank0()
        say_error(error, _rank())
        return 2


MENDABLE = (ValueError, OSError)
"""What a person can mend (YAML's errors are a third kind): one line, no traceback."""


def say_error(error: Exception, who: str = "") -> str:
    """Print what a person can mend as one line `error: ...`, with the name of the rank that says it; the line."""
    if os.environ.get("SCALETRANSFER_TRACEBACK", "") not in ("", "0"):
        traceback.print_exception(error)
    if who and os.environ.get("WORLD_SIZE", "1") != "1":
        print(file=sys.stderr)  # rank 0's progress bar stands on the line that this rank writes to
    line = f"error: {who}{sentence_of(error)}"
    print(line, file=sys.stderr, flush=True)
    record(line)
    return line


def record(line: str) -> None:
    """Let torch's launcher show this line as the last of what it says of this process, behind its own traceback.

    The file's form is that of torch.distributed.elastic.multiprocessing.errors.ErrorHandler.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    if path and not os.path.exists(path):
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": line, "extraInfo": extra}}, file)


def sentence_of(error: Exception) -> str:
    """The error as one line."""
    if isinstance(error, OSError) and error.strerror:
        names = " -> ".join(os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{names}: {error.strerror}" if names else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _wait_for_rank0() -> None:
    """What rank 0 refuses, all ranks refuse: its launcher then ends the others before they repeat the sentence."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)  # as long as a busy machine needs to end a process that has imported torch


def _rank() -> str:
    """Who speaks, where a launcher started several processes: an error of rank 3 alone must say so."""
    rank = os.environ.get("RANK", "0")
    return f"[rank {rank}] " if rank != "0" else ""


if __name__ == "__main__":
    sys.exit(main())

"""What a sweep leaves in its folder. The run folders are the truth; the tables are made of them, as often as wanted.

runs/<target>/<model>/<shot>/<seed>/   a fine-tuning run; finished when it has result.json
    sweep.json      what decides its result, from the day that it was started
    failure.json    the sentence with which it failed, and how often it was tried; removed when it succeeds
    output.txt      what it printed
results.csv         a row for each finished run and metric: the columns of the published tables, shares of one
failures.csv        a row for each run that failed, or that is skipped since a class has too few images
cache/              decoded images; may be deleted at any time
"""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from scaletransfer.config.files import shown
from scaletransfer.files import json_bytes, write_atomically
from scaletransfer.results import RESULT, Result, collect
from scaletransfer.sweep_grid import DIGESTS, RUNS, Run, shot_name
from scaletransfer.transfer.run import SELECTION

RESULTS, FAILURES, CACHE, LOCK = "results.csv", "failures.csv", "cache", "lock"
FAILURE, ASKED, CLAIM = "failure.json", "sweep.json", "sweep.lock"
COLUMNS = ("metric_value", "metric", "path", "seed", "shot", "pretrained_model", "dataset", "last_step")
FAILURE_COLUMNS = ("state", "path", "seed", "shot", "pretrained_model", "dataset", "attempts", "sentence")
METRICS = {
    "accuracy": "test/acc",
    "mean_auroc": "test/mean_auc",
    "mean_average_precision": "test/mean_average_precision",
}
"""Our names of metrics, and those of the published tables."""
State = Literal["finished", "failed", "skipped", "begun", "waiting"]


def state_of(run: Run) -> State:
    """What has become of a run, by what lies in its folder."""
    if (run.folder / RESULT).is_file():
        return "finished"
    if run.skipped:
        return "skipped"
    if (run.folder / FAILURE).is_file():
        return "failed"
    return "begun" if (run.folder / SELECTION).is_file() else "waiting"


def failure_of(run: Run) -> dict[str, Any]:
    """The sentence of a failed run and the number of attempts."""
    try:
        content = json.loads((run.folder / FAILURE).read_bytes())
        return {"sentence": str(content["sentence"]), "attempts": int(content["attempts"])}
    except FileNotFoundError:
        return {"sentence": "", "attempts": 0}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run.folder / FAILURE} cannot be read ({error}): remove it") from None


def write_failure(run: Run, sentence: str) -> None:
    """Keep why a run failed, and that it was tried once more."""
    run.folder.mkdir(parents=True, exist_ok=True)
    tried = failure_of(run)["attempts"] + 1
    write_atomically(run.folder / FAILURE, json_bytes({"sentence": sentence, "attempts": tried}))


def forget_failure(run: Run) -> None:
    """The run has succeeded."""
    (run.folder / FAILURE).unlink(missing_ok=True)


def check_asked(run: Run) -> None:
    """ValueError where the folder holds a run that was asked for with other settings, weights or images.

    Its result would stand in the table for what it is not.
    """
    if state_of(run) not in ("finished", "begun"):
        return
    path = run.folder / ASKED
    if not path.is_file():
        raise ValueError(f"{run.folder} holds a run that no sweep made: take another --out, or move it away")
    try:
        before = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): remove {run.folder}") from None
    now = json.loads(json.dumps(run.asked()))
    # a key that one of the two releases does not have is no difference
    for key in (key for key in now if key in before and before[key] != now[key]):
        change = f"from {shown(before[key])} to {shown(now[key])}" if key not in DIGESTS else "from what they were"
        raise ValueError(
            f"{run.folder} was made before {key} changed {change}: take another --out, or remove that folder to have "
            "the run made again"
        )


def write_asked(run: Run) -> None:
    """Say in the run's folder what is being made there."""
    path = run.folder / ASKED
    run.folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_bytes() != json_bytes(run.asked()):
        write_atomically(path, json_bytes(run.asked()))


def tidy(run: Run, keep: str) -> None:
    """Remove the checkpoints of a finished run where its network is enough."""
    if keep != "all" and (run.folder / "checkpoints").is_dir() and (run.folder / RESULT).is_file():
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)  # another task of the sweep may do the same


def write_tables(out: Path, runs: Sequence[Run]) -> list[Result]:
    """Make results.csv and failures.csv of the run folders; the results.

    Each is replaced as a whole, and one process at a time does it: what another one has finished is in it as well.

    Raises:
        ValueError: a result.json that is none.
    """
    with _alone(out):
        finished = [run.folder / RESULT for run in runs if (run.folder / RESULT).is_file()]
        results = collect(finished) if finished else []
        lines: list[Sequence[Any]] = [COLUMNS]
        for r in results:
            where = r.folder.relative_to(out).as_posix()
            for name, published in METRICS.items():
                if isinstance(value := r.metrics.get(name), int | float):
                    what = (f"{value:.12g}", published, where, r.seed, shot_name(r.shot))
                    lines.append((*what, r.pretrained_model, r.dataset, r.last_step))
        _write(out / RESULTS, lines)
        _write(out / FAILURES, [FAILURE_COLUMNS, *_failures(out, runs)])
    return results


def _failures(out: Path, runs: Sequence[Run]) -> Iterator[Sequence[Any]]:
    for run in runs:
        state = state_of(run)
        if state in ("failed", "skipped"):
            known = {"sentence": run.skipped, "attempts": 0} if state == "skipped" else failure_of(run)
            where = run.folder.relative_to(out).as_posix()
            what = (state, where, run.seed, shot_name(run.shot), run.model, run.target)
            yield (*what, known["attempts"], known["sentence"])


def _write(path: Path, lines: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    data = text.getvalue().encode("utf-8")
    if not path.is_file() or path.read_bytes() != data:
        write_atomically(path, data)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w", encoding="utf-8") as handle:
        with suppress(OSError):  # without locks the last one wins, and has read the same folders
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def claimed(run: Run) -> Iterator[bool]:
    """Whether this process alone works on a run; another one of this sweep, on whatever host, may.

    A lock that the system takes back when its process ends, however it ends, and that loader processes do not inherit.
    On file systems without locks everybody may: there the grid has to be divided by --index.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / CLAIM).open("w", encoding="utf-8") as handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                yield False
                return
            print(f"note: {run.folder} has no locks ({error.strerror}): share runs out by --index", flush=True)
        yield True


def check_folder(out: Path) -> None:
    """ValueError where a sweep cannot write, or would write among other things."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / RUNS).is_dir() and not (out / LOCK).exists():
        raise ValueError(f"--out {out} holds other things and no sweep: name a new folder, or an empty one")

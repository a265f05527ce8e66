"""A folder of shards made by several jobs: each writes its part, and the merge, once all are there, the rest."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scaletransfer.shard_build import BuildReport, check_workers, finish, finished_index, write_missing
from scaletransfer.shard_output import Output, Part, claimed, clear_part, parts_in, remove_work
from scaletransfer.shard_plan import Plan
from scaletransfer.shard_writer import WORK_FOLDER, ShardTask, shard_tasks

_SHOWN = 4  # parts that a sentence names one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReport:
    """What `build_part` did."""

    finished: bool
    """Whether the whole folder was finished already, so that nothing was done."""
    shards: int
    """Shards of this part, those without a usable image included."""
    images: int
    """Images that this run read."""
    seconds: float
    kept_shards: int
    """Shards of this part that an earlier, interrupted run had finished."""


def shards_of(plan: Plan, of: int) -> list[set[str]]:
    """File names of the shards of each of `of` parts: of about equal numbers of samples, from the plan alone.

    Largest first, each to the part that has the fewest samples (of equal ones, that with the lowest number).
    """
    loads = [(0, number) for number in range(of)]
    parts: list[set[str]] = [set() for _ in loads]
    for _, file, start, end in sorted(plan.shards(), key=lambda shard: shard[2] - shard[3]):
        load, number = heapq.heappop(loads)
        parts[number].add(file)
        heapq.heappush(loads, (load + end - start, number))
    return parts


def build_part(
    plan: Plan,
    place: Path | Output,
    part: Part,
    *,
    workers: int = 1,
    progress: Callable[[int], object] = lambda samples: None,
) -> PartReport:
    """Write the shards of one part of `plan` into `place`, or those that an interrupted run has not; no index.

    Other parts may be written at the same time, here or into other folders that are put together before `merge`.

    Raises ValueError where `build` does, for parts of another plan or of another number of parts in this folder, for
    the same part being made by another process, and if the range of 16-bit images would have to be measured.
    """
    start = time.monotonic()
    out = place if isinstance(place, Output) else Output(Path(place))
    check_workers(workers)
    _check_range(plan)
    if finished_index(plan, out) is not None:
        return PartReport(finished=True, shards=0, images=0, seconds=0.0, kept_shards=0)
    chosen = shards_of(plan, part.of)[part.number]
    with claimed(out, plan.digest, part=part):
        tasks = [task for task in shard_tasks(plan, out.folder) if task.file in chosen]
        try:
            _, images, kept = write_missing(out, tasks, workers, progress)
        except ValueError:
            clear_part(out, part, tasks)  # as in `build`; other parts keep what they have
            raise
    out.clean(part)
    seconds = time.monotonic() - start
    return PartReport(finished=False, shards=len(tasks), images=images, seconds=seconds, kept_shards=kept)


def merge(
    plan: Plan,
    place: Path | Output,
    *,
    workers: int = 1,
    progress: Callable[[int], object] = lambda samples: None,
) -> BuildReport:
    """Finish a folder that parts have written: check every shard, then write tables, side files and the index.

    The result is that of `build`, byte for byte.  `workers` threads hash the shards.

    Raises ValueError, and changes nothing, for parts that are missing or incomplete, of different plans or numbers of
    parts, for damaged shards, and where `build` does.
    """
    start = time.monotonic()
    out = place if isinstance(place, Output) else Output(Path(place))
    check_workers(workers)
    _check_range(plan)
    if (index := finished_index(plan, out)) is not None:
        return BuildReport(index=index, images=0, seconds=0.0, kept_shards=0)
    names = out.names()
    if not any(name.startswith(f"{WORK_FOLDER}/") for name in names):
        raise ValueError(
            f"{out} holds no part of a build; run the parts first (--part 0/N, --part 1/N, ...), or copy their folders "
            f"with their {WORK_FOLDER} into this one"
        )
    with claimed(out, plan.digest):
        tasks = shard_tasks(plan, out.folder)
        begun = sorted(parts_in(out, names))
        numbers = {part.of: part for part in begun}
        if len(numbers) > 1:
            several = " and ".join(f"part {part}" for part in numbers.values())
            raise ValueError(
                f"{out} holds {several}, which overlap; remove the folder and run all parts of one N, or run the "
                "command without --part and --merge, which keeps the shards that are there"
            )
        done, damaged = out.done(tasks, workers, progress)
        if len(done) < len(tasks):
            missing = [task for task in tasks if task.file not in done]
            raise ValueError(_lacking(out, plan, begun, missing, damaged))
        finish(plan, out, done)
    remove_work(out)
    return BuildReport(index=out.index(), images=0, seconds=time.monotonic() - start, kept_shards=len(done))


def _check_range(plan: Plan) -> None:
    if plan.encoding.bit_depth and not plan.encoding.pixel_max:
        raise ValueError(
            "a part can't know the range of all 16-bit images: run the same command with --measure instead of --part "
            "once, and give every part and --merge the --pixel-max that it prints"
        )


def _lacking(
    out: Output, plan: Plan, begun: Sequence[Part], missing: Sequence[ShardTask], damaged: Sequence[str]
) -> str:
    """The sentence that says which parts lack shards."""
    total = len(plan.shards())
    if not begun:
        return (
            f"{out} lacks {len(missing)} of {total} shards and no part was begun there; run the parts first "
            "(--part 0/N, --part 1/N, ...), or the command without --part and --merge, which continues"
        )
    parts = [Part(number, begun[0].of) for number in range(begun[0].of)]
    of_part = dict(zip(parts, shards_of(plan, begun[0].of), strict=True))
    absent = {task.file for task in missing} - set(damaged)
    found = [text for part in parts if (text := _lack(part, of_part[part], absent, part in begun))]
    found += [
        f"{file} of part {part} is damaged, or of another run than its marker"
        for part in parts
        for file in sorted(of_part[part] & set(damaged))
    ]
    again = [part for part in parts if of_part[part] & (absent | set(damaged))]
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return (
        f"{out} lacks {len(missing)} of {total} shards: {'; '.join(found[:_SHOWN])}{more}; run "
        f"{_named(again)} again, then --merge"
    )


def _lack(part: Part, files: Iterable[str], absent: set[str], begun: bool) -> str:
    files = set(files)
    lacking = sorted(files & absent)
    if not lacking:
        return ""
    if not begun:
        return f"part {part} ({len(files)} shards) has not run"
    return f"part {part} lacks {len(lacking)} of {len(files)} (the first: {lacking[0]})"


def _named(parts: Sequence[Part]) -> str:
    shown = ", ".join(str(part.number) for part in parts[:20]) + (", ..." if len(parts) > 20 else "")
    return f"part{'s' if len(parts) > 1 else ''} {shown} (--part I/{parts[0].of})"

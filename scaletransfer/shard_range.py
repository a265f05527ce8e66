"""The range that the 16-bit images of a data set really use, from a look at all of them before one is stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from scaletransfer.files import cache_folder, json_bytes, write_atomically
from scaletransfer.image_files import read_images
from scaletransfer.pixel_range import full_range
from scaletransfer.shard_image import UnusableImage, largest_value
from scaletransfer.shard_plan import Plan
from scaletransfer.shard_pool import run_all
from scaletransfer.shard_writer import WORK_FOLDER, ShardTask, shard_tasks


def measure_range(tasks: Sequence[ShardTask], workers: int, progress: Callable[[int], object]) -> int:
    """2^b - 1, with b the bits of the largest value of all 16-bit images of the tasks; 0 where there is none.

    Images that declare their white (PNG's sBIT, DICOM) do not count, nor do those that cannot be used and will be
    left out.  The result does not depend on `workers`.  What was found is kept beside the markers of shards, so that
    a build that was interrupted goes on with the same range.

    Raises ValueError for an archive that cannot be read, and what `shard_pool.run_all` raises.
    """
    largest, waiting = 0, []
    for task in tasks:
        found = _known(task)
        if found is None:
            waiting.append(task)
        else:
            largest = max(largest, found)
            progress(len(task.samples))
    with closing(run_all(measure, waiting, workers, progress)) as results:
        for result in results:
            largest = max(largest, result["largest"])
    return full_range(largest) if largest else 0


def measure_plan(plan: Plan, workers: int, progress: Callable[[int], object]) -> int:
    """`measure_range` of a plan, for jobs that write parts of it; what was found lies in the cache until all is known.

    Raises as `measure_range`.
    """
    folder = cache_folder() / "measured" / plan.digest
    (folder / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
    white = measure_range(shard_tasks(plan, folder), workers, progress)
    shutil.rmtree(folder, ignore_errors=True)  # another process may measure the same
    return white


def measure(task: ShardTask, progress: Callable[[int], object] | None = None) -> dict[str, Any]:
    """{"largest": value} of the images of one shard, written to its file in the work folder as well."""
    largest = 0
    wanted = [(sample.image, sample.span) for sample in task.samples if not sample.missing]
    with closing(read_images(task.root, wanted)) as images:
        for sample in task.samples:
            try:
                if not sample.missing:
                    largest = max(largest, largest_value(next(images)()))
            except UnusableImage:
                pass  # its reason is recorded when its shard is written
            except ValueError as error:
                raise ValueError(f"{task.root / sample.image}: {error}") from None
            if progress:
                progress(1)
    content = {"largest": largest}
    write_atomically(_file(task), json_bytes(content))
    return content


def _known(task: ShardTask) -> int | None:
    try:
        largest = json.loads(_file(task).read_bytes())["largest"]
        return largest if isinstance(largest, int) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # not measured, or damaged: measured again


def _file(task: ShardTask) -> Path:
    return task.folder / WORK_FOLDER / f"{task.file}.range.json"

"""Make a folder of shards from a plan: start or continue it, then tables, side files and, last, the index."""

from __future__ import annotations

import hashlib
import io
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from scaletransfer.files import drop_if_empty, json_bytes, write_atomically
from scaletransfer.index import INDEX_NAME, ShardIndex, write_index
from scaletransfer.index_fields import ShardInfo, SplitInfo, split_to_json
from scaletransfer.records import key_number
from scaletransfer.sample_table import count_patients, label_rows, label_totals, table_dtype
from scaletransfer.shard_output import INFO_NAME, Output, claimed, clear, plan_of_index, remove_work
from scaletransfer.shard_plan import Plan, Sample
from scaletransfer.shard_range import measure_range
from scaletransfer.shard_writer import ShardTask, shard_tasks, write_all


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """What `build` did."""

    index: ShardIndex
    images: int
    """Images that this run read; 0 if the folder was finished already."""
    seconds: float
    kept_shards: int
    """Shards that an earlier, interrupted run had finished."""


def build(
    plan: Plan,
    place: Path | Output,
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda samples: None,
    measured: Callable[[int], object] = lambda samples: None,
) -> BuildReport:
    """Write the shards of `plan` into the folder `place`, or continue an interrupted build of the same plan.

    The bytes do not depend on `workers` or on interruptions.  A folder that is finished with this plan is
    left as it is.  `overwrite` removes our files (no others) of another build first.  `progress` is called
    with a number of samples as they are done, and before that `measured` where the range of 16-bit images has to be
    measured (`shard_range`).

    Raises ValueError if the folder holds shards of another plan, another process writes it, bit depths are
    mixed or a split has no usable image, besides what `shard_writer.write_all` raises.
    """
    start = time.monotonic()
    out = place if isinstance(place, Output) else Output(Path(place))
    check_workers(workers)
    if not overwrite and (index := finished_index(plan, out)) is not None:
        return BuildReport(index=index, images=0, seconds=0.0, kept_shards=0)
    with claimed(out, plan.digest, overwrite=overwrite):
        try:
            if plan.encoding.bit_depth and not plan.encoding.pixel_max:
                white = out.known_range()
                if white is None:
                    white = measure_range(shard_tasks(plan, out.folder), workers, measured)
                    out.keep_range(white)
                plan = replace(plan, encoding=replace(plan.encoding, pixel_max=white))
            done, images, kept = write_missing(out, shard_tasks(plan, out.folder), workers, progress)
            finish(plan, out, done)
        except ValueError:
            # the options or the data are wrong: leave nothing of this run that refuses the mended command
            clear(out)
            remove_work(out)
            drop_if_empty(out.folder)
            raise
    remove_work(out)
    index = out.index()  # what is wrong with it now gives no reason to remove it
    return BuildReport(index=index, images=images, seconds=time.monotonic() - start, kept_shards=kept)


def check_workers(workers: int) -> None:
    """ValueError unless there is one at least."""
    if workers < 1:
        raise ValueError(f"--workers is {workers}; it must be at least 1")


def finished_index(plan: Plan, out: Output) -> ShardIndex | None:
    """The index of `out` if it is finished with this plan; what is left of its work folder is removed."""
    if plan_of_index(out) != plan.digest:
        return None
    index = out.index()
    remove_work(out)
    return index


def write_missing(
    out: Output, tasks: Sequence[ShardTask], workers: int, progress: Callable[[int], object]
) -> tuple[dict[str, dict[str, Any]], int, int]:
    """Write those of the shards that are not finished: ({file: marker} of all, images read, shards kept)."""
    done, _ = out.done(tasks, workers, progress)
    check_depth(done.values())
    kept, waiting = len(done), [task for task in tasks if task.file not in done]
    by_file = {task.file: task for task in waiting}
    # closing: no worker may still be writing when the folder is cleared
    with out.storing() as store, closing(write_all(waiting, workers, progress)) as markers:
        for content in markers:
            store(by_file[content["file"]], content)
            done[content["file"]] = content
            check_depth(done.values())
    return done, sum(len(task.samples) for task in waiting), kept


def check_depth(markers: Any) -> None:
    """ValueError if the images of these shards have 8 and 16 bits."""
    seen = _seen(markers)
    depths = {depth for _, depth in seen}
    if len(depths) > 1:
        counts = ", ".join(f"{sum(n for (_, d), n in seen.items() if d == depth)} of {depth} bits" for depth in depths)
        raise ValueError(
            f"images of 8 and of 16 bits a pixel are mixed (so far {counts}): give --bit-depth 8, or make two "
            "folders of shards"
        )


def _seen(markers: Any) -> Counter[tuple[int, int]]:
    """(channels, bits) -> images."""
    seen: Counter[tuple[int, int]] = Counter()
    for marker in markers:
        for kind, number in marker["seen"].items():
            channels, depth = kind.split("x")
            seen[int(channels), int(depth)] += number
    return seen


def finish(plan: Plan, out: Output, done: dict[str, dict[str, Any]]) -> None:
    """Tables, side files, then the index, when every shard is there; done: {file: marker} of all of them.

    Raises ValueError for a split without a usable image and for mixed bit depths.
    """
    check_depth(done.values())
    folder = out.folder
    tasks = shard_tasks(plan, folder)
    splits = {split: _finish_split(plan, folder, split, tasks, done) for split in plan.samples}
    for split, info in splits.items():
        write_atomically(folder / f"wids-{split}.json", json_bytes(wids_description(plan.source, split, info)))
    write_atomically(folder / INFO_NAME, json_bytes(timm_description(splits)))
    seen = _seen(done.values())
    image = {
        "extension": plan.extension,
        "size": plan.encoding.size,
        "channels": max(channels for channels, _ in seen),
        "bit_depth": max(depth for _, depth in seen),
        "pixel_max": max(marker["pixel_max"] for marker in done.values()),
    }
    content = {
        "source": plan.source,
        "task": plan.task,
        "label_kind": plan.label_kind,
        "left_out": dict(plan.left_out),
        "label_names": list(plan.label_names),
        "views": list(plan.views),
        "image": image,
        "encoder": plan.encoder,
        "options": dict(plan.options),
        "licence": plan.licence,
        "salt_fingerprint": plan.salt_fingerprint,
        "plan_sha256": plan.digest,
        "splits": {split: split_to_json(info) for split, info in splits.items()},
    }
    write_index(folder, content)
    tables = [info.table_file for info in splits.values()]
    out.publish([*tables, *(f"wids-{split}.json" for split in splits), INFO_NAME, INDEX_NAME])


def _finish_split(
    plan: Plan, folder: Path, split: str, tasks: Sequence[ShardTask], done: dict[str, dict[str, Any]]
) -> SplitInfo:
    samples = plan.samples[split]
    # a shard whose images are all in quarantine has no file: several readers fail on an empty tar
    markers = [done[task.file] for task in tasks if task.split == split]
    quarantine = tuple(dict(entry) for entry in plan.quarantine.get(split, ()))
    quarantine += tuple({"key": key, "reason": why} for marker in markers for key, why in marker["quarantine"])
    markers = [marker for marker in markers if marker["samples"]]
    if not markers:
        raise ValueError(
            f"no image of the split {split!r} of {plan.source} can be used (the first: "
            f"{quarantine[0]['reason']}); replace the images or leave the split out of the data set"
        )
    places = np.asarray(
        [(shard, *row) for shard, marker in enumerate(markers) for row in marker["rows"]], dtype=np.int64
    )
    table, data = sample_table(plan, [samples[row] for row in places[:, 1]], places[:, (0, 2, 3, 4)])
    name = f"samples-{split}.npy"
    write_atomically(folder / name, data)
    return SplitInfo(
        samples=len(table),
        patients=count_patients(table),
        table_file=name,
        table_sha256=hashlib.sha256(data).hexdigest(),
        shards=tuple(
            ShardInfo(**{key: marker[key] for key in ("file", "samples", "bytes", "sha256")}) for marker in markers
        ),
        totals=label_totals(table, plan.task, plan.label_names),
        quarantine=quarantine,
    )


def sample_table(
    plan: Plan | ShardIndex, samples: Sequence[Sample], places: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], bytes]:
    """The sample table of `samples`, one row each, and the bytes of its file.

    places: integers [n, 4], (position of the shard in the split's list, offset, size, CRC-32) of each image.
    """
    table = np.zeros(len(samples), table_dtype(plan.task, len(plan.label_names)))
    views = {"": -1} | {view: number for number, view in enumerate(plan.views)}
    table["key"] = [key_number(sample.key) for sample in samples]
    table["patient"] = [sample.patient_number for sample in samples]
    table["view"] = [views[sample.view] for sample in samples]
    labels = label_rows([sample.labels for sample in samples], plan.label_kind, plan.label_names)
    table["labels" if plan.task == "multilabel" else "label"] = labels
    for column, field in enumerate(("shard", "offset", "size", "crc")):
        table[field] = places[:, column]
    buffer = io.BytesIO()
    np.save(buffer, table, allow_pickle=False)
    return table, buffer.getvalue()


def wids_description(source: str, split: str, info: SplitInfo) -> dict[str, Any]:
    """What `wids.ShardListDataset("wids-train.json")` reads (wids 0.1.11, wids_specs.resolve_dsdesc)."""
    shards = [{"url": shard.file, "nsamples": shard.samples, "filesize": shard.bytes} for shard in info.shards]
    return {"wids_version": 1, "name": f"{source}-{split}", "shardlist": shards}


def timm_description(splits: Mapping[str, SplitInfo]) -> dict[str, Any]:
    """What timm's `ReaderWds` reads (timm 1.0.31, reader_wds._parse_split_info)."""
    return {
        "splits": {
            split: {
                "name": split,
                "num_samples": info.samples,
                "filenames": [shard.file for shard in info.shards],
                "shard_lengths": [shard.samples for shard in info.shards],
            }
            for split, info in splits.items()
        }
    }

"""Which programs are measured on which images."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.bench_data import Data
from bench.conductor import Program
from bench.peer_environments import missing, python_of

HERE = Path(__file__).resolve().parent
SIZE = 224
BATCH = 64
LARGE_BATCH = 16
"""Of original-size X-rays, of which a slow pipeline takes six seconds for 64."""
SCALES = (8, 4, 2)
"""Parts at which a JPEG may be decoded; ours does while the result stays at least twice the wanted side."""
LIMIT = "decode alone"
OURS = "ours"


@dataclass(kw_only=True)
class Line:
    """A line of a table: one program with each number of workers.

    limit: the name of the decoder's line that it is compared with. ours: of our line that it is compared with.
    """

    name: str
    script: str
    peer: str
    settings: dict[str, Any]
    batch: int
    limit: str = ""
    ours: str = ""
    only_workers: bool = False
    """Left out where there are no workers."""
    install: str = ""
    python: str = sys.executable
    programs: dict[int, Program] = field(default_factory=dict)

    def program(self, workers: int) -> Program | None:
        """The program with so many workers; None where there is none."""
        if self.install or (self.only_workers and not workers):
            return None
        made = Program(
            name=f"{self.name}, {workers} workers",
            command=[self.python, str(HERE / self.script)],
            settings={**self.settings, "size": SIZE, "batch": self.batch, "workers": workers, "warm": 2},
        )
        self.programs[workers] = made
        return made

    def rate(self, workers: int) -> float:
        """Images per second; 0 where there is no number."""
        return self.programs[workers].rate if workers in self.programs else 0.0


def line_up(name: str, data: Data, peers: Path, quick: bool) -> list[Line]:
    """The lines of one workload. quick: without variants."""
    lines = _LINES[name](data)
    kept = [line for line in lines if not (quick and line.name in _VARIANTS)]
    for line in kept:
        line.install = missing(line.peer, peers)
        line.python = python_of(line.peer, peers)
    return kept


_VARIANTS = {
    "ours, processes",
    "ours, loose files",
    "ours, affine, processes",
    "ours, centre square resized",
    "decode alone, 1/8",
    "webdataset default, affine",
    "mosaicml MDS, affine",
    "DALI on CPU, affine",
    "ours, reading alone",
}


def _decoder(data: Data, scale: int, batch: int, name: str) -> Line:
    settings = {"tars": _texts(data), "channels": data.drawn.channels, "scale": scale}
    return Line(name=name, script="peers/decode_only.py", peer="simplejpeg", settings=settings, batch=batch)


def _ours(data: Data, augment: str, batch: int, name: str, limit: str = LIMIT, **settings: Any) -> Line:
    place = {} if "files" in settings else {"shards": str(data.shards.absolute())}
    kind = "xray" if data.drawn.channels == 1 else "natural"
    chosen = {"kind": kind, "augment": augment, **place, **settings}
    only_workers = settings.get("worker_kind") == "processes"
    return Line(
        name=name,
        script="ours.py",
        peer="cv2",
        settings=chosen,
        batch=batch,
        limit=limit,
        only_workers=only_workers,
    )


def _peer(script: str, peer: str, batch: int, name: str, ours: str = OURS, limit: str = LIMIT, **settings: Any) -> Line:
    path = f"peers/{script}.py"
    return Line(name=name, script=path, peer=peer, settings=settings, batch=batch, ours=ours, limit=limit)


def _webdataset(data: Data, augment: str, name: str, ours: str = OURS, stages: bool = False) -> Line:
    settings: dict[str, Any] = {"tars": _texts(data), "augment": augment, "stages": stages}
    return _peer("webdataset_default", "webdataset", BATCH, name, ours, **settings)


def _mds(data: Data, augment: str, name: str, ours: str = OURS) -> Line:
    settings: dict[str, Any] = {
        "tars": _texts(data),
        "augment": augment,
        "mds": str(data.shards.absolute().parent / "mds"),
    }
    return _peer("streaming_mds", "mosaicml-streaming", BATCH, name, ours, **settings)


def _dali(data: Data, augment: str, batch: int, name: str, ours: str = OURS, limit: str = LIMIT, **place: Any) -> Line:
    settings = {"augment": augment, "channels": data.drawn.channels, **(place or {"tars": _texts(data)})}
    return _peer("dali_cpu", "DALI", batch, name, ours, limit, **settings)


def _texts(data: Data) -> list[str]:
    return [str(path.absolute()) for path in data.tars]


def _xray(data: Data) -> list[Line]:
    files, batch = str(data.files.absolute()), LARGE_BATCH
    side = min(data.drawn.height, data.drawn.width)
    scale = next((scale for scale in SCALES if side >= 2 * scale * SIZE), 1)
    limit = f"{LIMIT}, 1/{scale}, as ours does" if scale > 1 else LIMIT
    lines = [_decoder(data, 1, batch, LIMIT)]
    if scale > 1:
        lines.append(_decoder(data, scale, batch, limit))
    if scale != 8:
        lines.append(_decoder(data, 8, batch, "decode alone, 1/8"))
    return [
        *lines,
        _ours(data, "published", batch, OURS, limit),
        _ours(data, "published", batch, "ours, processes", limit, worker_kind="processes"),
        _ours(data, "published", batch, "ours, loose files", limit, files=files),
        _peer("published_xray", "cv2", batch, "the published steps", OURS, limit, files=files),
        _dali(data, "affine", batch, "DALI on CPU", OURS, limit, files=files),
    ]


def _xray256(data: Data) -> list[Line]:
    affine = "ours, affine"
    return [
        _decoder(data, 1, BATCH, LIMIT),
        _ours(data, "crop", BATCH, OURS),
        _ours(data, "crop", BATCH, "ours, processes", worker_kind="processes"),
        _ours(data, "centre", BATCH, "ours, centre square resized"),
        _ours(data, "affine", BATCH, affine),
        _ours(data, "affine", BATCH, "ours, affine, processes", worker_kind="processes"),
        _ours(data, "read", BATCH, "ours, reading alone"),
        _webdataset(data, "crop", "webdataset default"),
        _webdataset(data, "affine", "webdataset default, affine", affine),
        _webdataset(data, "crop", "open_clip-like stages", stages=True),
        _mds(data, "crop", "mosaicml MDS"),
        _mds(data, "affine", "mosaicml MDS, affine", affine),
        _dali(data, "crop", BATCH, "DALI on CPU"),
        _dali(data, "affine", BATCH, "DALI on CPU, affine", affine),
    ]


def _colour(data: Data) -> list[Line]:
    files, crop = str(data.files.absolute()), "resized_crop"
    return [
        _decoder(data, 1, BATCH, LIMIT),
        _ours(data, crop, BATCH, OURS),
        _ours(data, crop, BATCH, "ours, processes", worker_kind="processes"),
        _ours(data, crop, BATCH, "ours, loose files", files=files),
        _peer("image_folder", "torchvision", BATCH, "ImageFolder + PIL", files=files),
        _webdataset(data, crop, "webdataset default"),
        _webdataset(data, crop, "open_clip-like stages", stages=True),
        _mds(data, crop, "mosaicml MDS"),
        _dali(data, crop, BATCH, "DALI on CPU", files=files),
    ]


def _colour256(data: Data) -> list[Line]:
    crop = "resized_crop"
    return [
        _decoder(data, 1, BATCH, LIMIT),
        _ours(data, crop, BATCH, OURS),
        _ours(data, crop, BATCH, "ours, processes", worker_kind="processes"),
        _webdataset(data, crop, "webdataset default"),
        _webdataset(data, crop, "open_clip-like stages", stages=True),
        _mds(data, crop, "mosaicml MDS"),
        _dali(data, crop, BATCH, "DALI on CPU"),
    ]


_LINES: dict[str, Callable[[Data], list[Line]]] = {
    "xray": _xray,
    "xray256": _xray256,
    "colour": _colour,
    "colour256": _colour256,
}

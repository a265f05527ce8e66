"""The limit: simplejpeg (libjpeg-turbo) over images that are in memory already, and nothing else.

Settings: ``tars`` (paths), ``channels``, ``scale`` (1, 2, 4 or 8: decoded at that part of the size, by the inverse
DCT of fewer coefficients), ``batch``; ``workers``: threads, 0 is this one alone.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import simplejpeg
from bench.peers.protocol import Opened, Settings, serve


def opened(settings: Settings) -> Opened:
    """Endless rounds over all images."""
    files: list[bytes] = []
    for path in settings["tars"]:
        with tarfile.open(path) as tar:
            members = [member for member in tar if member.name.endswith(".jpg")]
            files += [stream.read() for stream in map(tar.extractfile, members) if stream]
    scale = settings["scale"]
    height, width, _, _ = simplejpeg.decode_jpeg_header(files[0])
    kind = "GRAY" if settings["channels"] == 1 else "RGB"
    least = {"min_height": -(-height // scale), "min_width": -(-width // scale)} if scale > 1 else {}

    def decode(data: bytes) -> Any:
        return simplejpeg.decode_jpeg(data, kind, **least)

    def decode_all(chosen: list[bytes]) -> None:
        for data in chosen:
            decode(data)

    def batches() -> Iterator[int]:
        threads = max(1, settings["workers"])
        pool = ThreadPoolExecutor(threads)
        every = pool.map if settings["workers"] else map
        at = 0
        while True:
            chosen = [files[(at + number) % len(files)] for number in range(settings["batch"])]
            at += len(chosen)
            # pieces of several images: handing over each by itself would cost a tenth of decoding a small one
            for _ in every(decode_all, [chosen[piece :: 4 * threads] for piece in range(4 * threads)]):
                pass
            yield len(chosen)

    return batches(), lambda: "uint8, " + "x".join(str(side) for side in decode(files[0]).shape)


serve(opened)

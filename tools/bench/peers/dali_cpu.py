"""NVIDIA DALI on the CPU: its own readers, decoders and operators, uint8 images out.

Settings: ``files`` (a folder a class) or ``tars`` (paths), ``channels``, ``augment`` (crop, affine, resized_crop),
``size``, ``batch``, ``workers`` (threads; 0 is one).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.peers.protocol import Opened, Settings, serve
from nvidia.dali import fn, pipeline_def, types


def pipeline(settings: Settings) -> Any:
    """The graph for these settings."""
    size, augment = settings["size"], settings["augment"]
    kind = types.GRAY if settings["channels"] == 1 else types.RGB

    def read() -> Any:
        if "files" in settings:
            return fn.readers.file(file_root=settings["files"], random_shuffle=True, name="reader")
        return fn.readers.webdataset(paths=settings["tars"], ext=["jpg", "cls"], random_shuffle=True, name="reader")

    @pipeline_def(batch_size=settings["batch"], num_threads=max(1, settings["workers"]), device_id=None, seed=0)
    def graph() -> Any:
        data, label = read()
        if augment == "resized_crop":
            images = fn.decoders.image_random_crop(
                data, device="cpu", output_type=kind, random_area=[0.08, 1.0], random_aspect_ratio=[0.75, 4 / 3]
            )
            images = fn.resize(images, size=[size, size])
            return fn.flip(images, horizontal=fn.random.coin_flip()), label
        images = fn.decoders.image(data, device="cpu", output_type=kind)
        if augment == "crop":
            places = {"crop_pos_x": fn.random.uniform(range=[0, 1]), "crop_pos_y": fn.random.uniform(range=[0, 1])}
            return fn.crop(images, crop=[size, size], **places), label
        images = fn.crop(fn.resize(images, size=size, mode="not_smaller"), crop=[size, size])
        turned = fn.transforms.rotation(angle=fn.random.uniform(range=[-45, 45]), center=[size / 2, size / 2])
        zoom = fn.random.uniform(range=[0.9, 1.1])
        scaled = fn.transforms.scale(scale=fn.stack(zoom, zoom), center=[size / 2, size / 2])
        shift = 0.15 * size
        shifted = fn.transforms.translation(offset=fn.random.uniform(range=[-shift, shift], shape=[2]))
        moved = fn.transforms.combine(turned, scaled, shifted)
        return fn.warp_affine(images, matrix=moved, inverse_map=False), label

    return graph()


def opened(settings: Settings) -> Opened:
    """The endless pipeline."""
    made = pipeline(settings)
    made.build()
    last: list[Any] = []

    def batches() -> Iterator[int]:
        while True:
            images, _ = made.run()
            last[:] = [images]
            yield len(images)

    def describe() -> str:
        sides = last[0].as_array().shape
        return f"{last[0].dtype.name.lower()} {'x'.join(str(side) for side in sides)}"

    return batches(), describe


serve(opened)

"""How fast X-rays become shards, next to the usual ways and to what the libraries allow.

    python tools/bench/make_shards.py                    # about three minutes
    python tools/bench/make_shards.py --images 100 --repeats 1

Draws a dozen radiographs of 2320x2828 pixels as grey JPEGs of about 600 KB and names each of them many times, so that
all reading is from memory.  Every way then makes them small (short side 512, JPEG quality 95) and writes them to tar
files.  The ways take turns, so that a busy moment of the machine meets all of them; the table has the median of the
repetitions, how far they spread, and the ratio to the limit.  The last column is the time that processors worked,
worker processes included: on a busy machine it says more than the clock.

    the limit          decode, scale and encode in memory, as we do it, on one thread; nothing is read or written
    ours               make_shards --size 512, from the plan to the finished index; durable on disk (fsync), hashed
    cv2 + TarWriter    cv2.imdecode, cv2.resize (INTER_AREA), cv2.imencode, webdataset.TarWriter; once with the flags
                       that read colour, which are OpenCV's default, and once as grey
    PIL + TarWriter    Image.open, resize (LANCZOS), save, webdataset.TarWriter

OpenCV has one thread, so that one process means one core.  The others' ways take a quarter of the images, for they are
slow; ours takes all of them, since starting worker processes takes a third of a second once.  A second row of the
limit runs on two threads: it shows how much a second core of this machine adds to the first.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
import PIL
import simplejpeg
from PIL import Image

from scaletransfer.cli import CommandParser, run_command
from scaletransfer.keys import PUBLIC_SALT
from scaletransfer.shard_pixels import encoded, jpeg_pixels, scaled
from scaletransfer.shards import Encoding, build, plan_shards
from scaletransfer.sources import open_source
from scaletransfer.synthetic_render import render

HEIGHT, WIDTH, BYTES = 2828, 2320, 600_000
DRAWN = 12
QUALITY = 95


def main(argv: Sequence[str]) -> int:
    """Measure and print the table; 0."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=int, default=960, metavar="N", help="images a repetition (default: %(default)s)")
    add("--repeats", type=int, default=3, metavar="R", help="repetitions of every way (default: %(default)s)")
    add("--size", type=int, default=512, metavar="PX", help="short side to scale to (default: %(default)s)")
    add("--folder", type=Path, help="where files are written, and removed at the end (default: a temporary folder)")
    options = parser.parse_args(argv)
    for name in ("images", "repeats", "size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    cv2.setNumThreads(0)
    folder = Path(tempfile.mkdtemp(prefix="bench-make-shards-", dir=options.folder))
    try:
        measure(folder, options)
    finally:
        shutil.rmtree(folder)
    return 0


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Draw, let all ways take turns, and print."""
    files = draw(folder / "images", options.images)
    weight = statistics.mean(path.stat().st_size for path in files[:DRAWN])
    print(f"{platform.platform()}, {processor()}, {os.cpu_count()} cores")
    print(
        f"Python {platform.python_version()}, simplejpeg {simplejpeg.__version__}, OpenCV {cv2.__version__}, "
        f"Pillow {PIL.__version__}, webdataset {version('webdataset')}, numpy {np.__version__}"
    )
    print(
        f"{len(files)} images of {WIDTH}x{HEIGHT} ({weight / 1000:.0f} KB, {min(DRAWN, len(files))} different ones) to "
        f"short side {options.size}, {options.repeats} repetitions in turn"
    )
    plan = plan_shards(
        open_source("image_folder", folder / "images"), PUBLIC_SALT, encoding=Encoding(size=options.size)
    )
    memory = [path.read_bytes() for path in files[:DRAWN]]
    memory = (memory * (len(files) // len(memory) + 1))[: len(files)]

    few = files[: -(-len(files) // 4)]

    def ours(workers: int) -> Callable[[], object]:
        return lambda: build(plan, folder / "ours", workers=workers)

    ways: dict[str, Callable[[], object]] = {
        "the limit, 1 thread": lambda: [in_memory(data, options.size) for data in memory],
        "the limit, 2 threads": lambda: on_threads(memory, options.size, 2),
        "ours, 1 worker": ours(1),
        "ours, 2 workers": ours(2),
        "cv2 + TarWriter, read as colour": lambda: by_cv2(folder / "cv2.tar", few, options.size, cv2.IMREAD_COLOR),
        "cv2 + TarWriter, read as grey": lambda: by_cv2(folder / "cv2.tar", few, options.size, cv2.IMREAD_GRAYSCALE),
        "PIL + TarWriter": lambda: by_pillow(folder / "pil.tar", few, options.size),
    }
    by_cv2(folder / "warm.tar", files[:2], options.size)  # imports, and the first pages of memory
    by_pillow(folder / "warm.tar", files[:2], options.size)
    in_memory(memory[0], options.size)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    busy: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(options.repeats):
        for name, way in ways.items():
            shutil.rmtree(folder / "ours", ignore_errors=True)
            start, used = time.perf_counter(), processor_seconds()
            way()
            seconds[name].append(time.perf_counter() - start)
            busy[name].append(processor_seconds() - used)
            if sys.stderr.isatty():
                print(f"repetition {repetition + 1}: {name}, {seconds[name][-1]:.1f} s", file=sys.stderr)
    report(seconds, busy, {name: len(few if "TarWriter" in name else files) for name in ways})
    worst = min(fidelity(data, options.size) for data in memory[:DRAWN])
    print(f"ours against decoding all of the picture, before it is encoded: {worst:.1f} dB PSNR or better")


def report(seconds: dict[str, list[float]], busy: dict[str, list[float]], images: dict[str, int]) -> None:
    """The table, and the ratios that are promised."""
    rates = {name: [images[name] / value for value in values] for name, values in seconds.items()}
    median = {name: statistics.median(values) for name, values in rates.items()}
    limit, one, two = median["the limit, 1 thread"], median["ours, 1 worker"], median["ours, 2 workers"]
    print(f"\n{'':34}{'images/s':>10}{'spread':>9}{'of limit':>10}{'ours, 1 worker, is':>20}{'CPU ms an image':>17}")
    for name, values in rates.items():
        spread = (max(values) - min(values)) / median[name]
        print(
            f"{name:34}{median[name]:10.1f}{spread:9.0%}{median[name] / limit:10.2f}{one / median[name]:18.2f} x"
            f"{statistics.median(busy[name]) / images[name] * 1000:17.2f}"
        )
    # of one repetition, whose ways ran one after the other: that is steadier than the ratio of the medians
    pairs = [a / b for a, b in zip(rates["ours, 2 workers"], rates["ours, 1 worker"], strict=True)]
    cores = [a / b for a, b in zip(rates["the limit, 2 threads"], rates["the limit, 1 thread"], strict=True)]
    print(
        f"\nfrom 1 to 2 workers: {two / one:.2f} x (median of the ratios inside a repetition "
        f"{statistics.median(pairs):.2f}); "
        f"the limit from 1 to 2 threads: {statistics.median(cores):.2f} x"
    )


def draw(folder: Path, images: int) -> list[Path]:
    """`images` files in the layout of an image folder, of which DRAWN differ."""
    pool: list[Path] = []
    found = []
    for number in range(images):
        path = folder / "train" / f"class{number % 2}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < DRAWN:
            path.write_bytes(radiograph(number))
            pool.append(path)
        else:
            os.link(pool[number % DRAWN], path)
        found.append(path)
    return found


def radiograph(number: int) -> bytes:
    """A drawn chest as the JPEG whose size is nearest to BYTES; how much grain it has decides about the quality."""
    pixels = render(
        effects={},
        findings={},
        view="PA",
        sex="Female" if number % 2 else "Male",
        age=30 + 4 * number,
        size=(HEIGHT, WIDTH),
        patient_seed=(number,),
        study_seed=(number,),
        image_seed=(number,),
    )
    return min((encoded(pixels, "jpg", quality) for quality in range(55, 98, 3)), key=lambda d: abs(len(d) - BYTES))


def in_memory(data: bytes, short: int) -> bytes:
    """What every image costs us at least."""
    picture = Image.open(io.BytesIO(data))
    pixels = jpeg_pixels(data, picture, short)
    assert pixels is not None
    return encoded(scaled(pixels, picture.size, short), "jpg", QUALITY)


def on_threads(memory: Sequence[bytes], short: int, threads: int) -> None:
    """The same on several threads; decoding, scaling and encoding run beside each other."""
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda data: in_memory(data, short), memory):
            pass


def fidelity(data: bytes, short: int) -> float:
    """PSNR in dB of a scaled-down picture against one of which everything was decoded."""
    picture = Image.open(io.BytesIO(data))
    pixels = jpeg_pixels(data, picture, short)
    assert pixels is not None
    small = scaled(pixels, picture.size, short)
    whole = cv2.resize(
        simplejpeg.decode_jpeg(data, "GRAY"), (small.shape[1], small.shape[0]), interpolation=cv2.INTER_AREA
    )
    return cv2.PSNR(small, whole)


def by_cv2(out: Path, files: Sequence[Path], short: int, flags: int = cv2.IMREAD_COLOR) -> None:
    """What a script with OpenCV and webdataset does."""

    def small(data: bytes) -> bytes:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        assert pixels is not None
        height, width = pixels.shape[:2]
        scale = short / min(height, width)
        pixels = cv2.resize(pixels, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
        return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()

    write_tar(out, files, small)


def by_pillow(out: Path, files: Sequence[Path], short: int) -> None:
    """What a script with Pillow and webdataset does."""

    def small(data: bytes) -> bytes:
        picture = Image.open(io.BytesIO(data))
        scale = short / min(picture.size)
        width, height = (round(side * scale) for side in picture.size)
        buffer = io.BytesIO()
        picture.resize((width, height), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=QUALITY)
        return buffer.getvalue()

    write_tar(out, files, small)


def write_tar(out: Path, files: Sequence[Path], small: Callable[[bytes], bytes]) -> None:
    """One tar of all images, by webdataset."""
    import webdataset  # here: our worker processes import this module, and this one takes two seconds

    with webdataset.TarWriter(str(out)) as writer:
        for sample in samples(files, small):
            writer.write(sample)


def samples(files: Sequence[Path], small: Callable[[bytes], bytes]) -> Iterator[dict[str, object]]:
    """What TarWriter takes: a key, an image, a class."""
    for path in files:
        yield {"__key__": path.stem, "jpg": small(path.read_bytes()), "cls": path.parent.name[-1]}


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


def processor() -> str:
    """Its name, where Linux says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    raise SystemExit(run_command(main))

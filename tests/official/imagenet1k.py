"""A tiny ILSVRC2012 in its official layouts: tars as they are downloaded, or what they are extracted to."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

WNIDS = ("n01440764", "n01443537", "n01484850", "n01491361", "n01494475", "n01496331", "n01498041", "n01514668")
TRAIN_TAR, VALID_TAR, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12"
KAGGLE = "ILSVRC/Data/CLS-LOC"


def write_imagenet1k(
    root: Path,
    *,
    seed: int = 0,
    classes: int = 4,
    per_class: int = 6,
    valid: int = 12,
    train_as: str = "tar",
    valid_as: str = "tar",
    labels_as: str = "devkit.tar.gz",
    base: str = ".",
) -> Path:
    """Write the set and return what --root takes; the images depend on seed and sizes alone.

    train_as: tar (of tars), tars, folders. valid_as: tar, flat, folders, none. labels_as: devkit, devkit.tar.gz, list,
    kaggle, none. base: where train and val lie below root.
    """
    rng = np.random.default_rng(seed)
    wnids = WNIDS[:classes]
    train = {}
    for number, wnid in enumerate(wnids):
        ids = rng.permutation(30_000)[:per_class]
        # as in the real set, one PNG and some CMYK go by the name of JPEG
        kinds = [("PNG", "CMYK")[number] if number < 2 and place == 0 else "JPEG" for place in range(per_class)]
        train[wnid] = {f"{wnid}_{i}.JPEG": draw(rng, kind) for i, kind in zip(ids, kinds, strict=True)}
    answers = [wnids[number] for number in rng.integers(0, classes, valid)]
    images = {f"ILSVRC2012_val_{number:08d}.JPEG": draw(rng) for number in range(1, valid + 1)}
    where = root / base
    where.mkdir(parents=True, exist_ok=True)
    if train_as == "tar":
        (where / TRAIN_TAR).write_bytes(tar({f"{wnid}.tar": tar(files) for wnid, files in train.items()}))
    elif train_as == "tars":
        put(where / "train", {f"{wnid}.tar": tar(files) for wnid, files in train.items()})
    else:
        for wnid, files in train.items():
            put(where / "train" / wnid, files)
    if valid_as == "tar":
        (where / VALID_TAR).write_bytes(tar(images))
    elif valid_as == "flat":
        put(where / "val", images)
    elif valid_as == "folders":
        for (name, data), wnid in zip(images.items(), answers, strict=True):
            put(where / "val" / wnid, {name: data})
    if valid_as not in ("folders", "none"):
        _write_labels(root, labels_as, wnids, answers, rng)
    return root


def _write_labels(
    root: Path, kind: str, wnids: Sequence[str], answers: Sequence[str], rng: np.random.Generator
) -> None:
    if kind == "list":
        (root / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(answers) + "\n")
    elif kind == "kaggle":
        rows = [f"ILSVRC2012_val_{n:08d},{wnid} 1 2 30 40 {wnid} 0 0 9 9 " for n, wnid in enumerate(answers, 1)]
        lines = ["ImageId,PredictionString", *(rows[n] for n in rng.permutation(len(rows)))]
        (root / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    elif kind.startswith("devkit"):
        # IDs are not in the order of the names
        ids = {wnid: int(number) for wnid, number in zip(wnids, rng.permutation(len(wnids)) + 1, strict=True)}
        files = {
            "data/meta.mat": meta_mat(ids),
            "data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{ids[wnid]}\n" for wnid in answers).encode(),
            "readme.txt": b"ILSVRC2012 development kit\n",
        }
        if kind == "devkit":
            for name, data in files.items():
                put((root / DEVKIT / name).parent, {Path(name).name: data})
        else:
            packed = tar({f"{DEVKIT}/{name}": data for name, data in files.items()}, mode="w:gz")
            (root / f"{DEVKIT}.tar.gz").write_bytes(packed)


def meta_mat(ids: Mapping[str, int]) -> bytes:
    """data/meta.mat of the devkit: the leaves first, by ID, then the synsets above them."""
    from scipy.io import savemat

    order = sorted(ids, key=lambda wnid: ids[wnid])
    rows = [(ids[wnid], wnid, f"word of {wnid}, another", "a gloss", 0, np.zeros((0, 0)), 0, 1300) for wnid in order]
    children = np.array([[ids[wnid] for wnid in order]], np.uint8)
    rows.append((len(ids) + 1, "n00001740", "entity", "a gloss", len(ids), children, 1, 0))
    names = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    table = np.empty((len(rows), 1), [(name, object) for name in (*names, "num_train_images")])
    for number, row in enumerate(rows):
        table[number, 0] = row
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": table})
    return buffer.getvalue()


def draw(rng: np.random.Generator, kind: str = "JPEG") -> bytes:
    """A picture that differs from all others, 32 to 48 pixels a side."""
    height, width = rng.integers(32, 49, 2)
    ramp = np.linspace(0, 120, width)[None, :, None]
    pixels = (ramp + rng.integers(0, 130, (height, width, 3))).astype(np.uint8)
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels)
    if kind == "CMYK":
        picture = picture.convert("CMYK")
    picture.save(buffer, "PNG" if kind == "PNG" else "JPEG")
    return buffer.getvalue()


def tar(files: Mapping[str, bytes], mode: str = "w") -> bytes:
    """A tar as GNU's writes it: its own headers, and an end of zeros."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=tarfile.GNU_FORMAT) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_339_000_000
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def put(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)

"""A folder of drawn chest X-rays with one folder a class: a second task, to transfer to.

Its findings are none of CheXpert's (`synthetic_more_findings`), its patients are none of those that
`synthetic_chexpert` draws with any seed, and each of them is there once, in one class.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from scaletransfer.synthetic_draw import Picture, check_options, draw_all, film_size, new_folder
from scaletransfer.synthetic_more_findings import MORE_EFFECTS
from scaletransfer.synthetic_rows import draw_person

NORMAL = "normal"
CLASSES = tuple(sorted((NORMAL, *MORE_EFFECTS)))

_NUMBERS, _PERSON, _PATIENT, _STUDY, _IMAGE = range(5)


def synthetic_xray_folder(
    out: Path,
    *,
    images_per_class: int,
    seed: int,
    valid_per_class: int | None = None,
    size: int = 320,
    workers: int = 1,
) -> dict[str, int]:
    """Make the folder `out` with train/<class>/*.jpg and valid/<class>/*.jpg, the layout of the source
    image_folder.

    images_per_class: training images of each of CLASSES; valid_per_class: validation images, None for as
    many. size: about the short side in pixels. All are frontal (PA or AP). The same arguments, whatever
    `workers`, give the same bytes; a file's name is a patient's number, drawn over all classes and splits.

    Returns {"train": images, "valid": images}. Raises ValueError for options out of range
    and an `out` that exists and isn't empty; then and after any failure nothing is left behind.
    """
    held_out = images_per_class if valid_per_class is None else valid_per_class
    check_options(
        out,
        {
            "images-per-class": (images_per_class, 1, None),
            "valid-per-class": (held_out, 1, None),
            "seed": (seed, 0, None),
            "size": (size, 64, 4096),
            "workers": (workers, 1, None),
        },
    )
    counts = {"train": images_per_class, "valid": held_out}
    base = _base(seed)
    places = [(split, name) for split, count in counts.items() for name in CLASSES for _ in range(count)]
    numbers = np.random.default_rng((base, _NUMBERS)).permutation(len(places)) + 1
    pictures = [_picture(*place, int(number), base, size) for place, number in zip(places, numbers, strict=True)]
    with new_folder(out) as draft:
        draw_all(draft, pictures, MORE_EFFECTS, workers)
    return {split: count * len(CLASSES) for split, count in counts.items()}


def _base(seed: int) -> int:
    """128 bits that stand for `seed` in all that is drawn here. CheXpert's drawing starts its generators from small
    numbers, the seed first; numpy makes one list of words of them, in which (2**32, 12, 1) is (0, 1, 12, 1), so that
    a number of our own behind the seed would not keep the two apart."""
    return int.from_bytes(hashlib.sha256(f"xray_folder/{seed}".encode()).digest()[:16], "big")


def _picture(split: str, name: str, number: int, base: int, size: int) -> Picture:
    """The picture of patient `number`, of whom all but the finding comes from `_base` and the number."""
    rng = np.random.default_rng((base, _PERSON, number))
    sex, age = draw_person(rng)
    return Picture(
        path=f"{split}/{name}/patient{number:05d}.jpg",
        view="AP" if rng.uniform() < 0.5 else "PA",
        findings={} if name == NORMAL else {name: 0.65 + 0.35 * rng.uniform()},
        sex=sex,
        age=age,
        size=film_size(rng, size),
        patient_seed=(base, _PATIENT, number),
        study_seed=(base, _STUDY, number),
        image_seed=(base, _IMAGE, number),
    )

"""A folder in the official CheXpert layout with drawn pictures.

Rows are those of the real table where it is installed, so that views, missing labels and patients are as they
are; the pictures are drawn (`synthetic_render`) and show what the labels say.
"""

from __future__ import annotations

import csv
import zlib
from pathlib import Path

import numpy as np

from scaletransfer.synthetic_draw import Picture, check_options, draw_all, film_size, new_folder
from scaletransfer.synthetic_findings import CHEXPERT_EFFECTS
from scaletransfer.synthetic_rows import HEADER, Row, choose, draw_rows, known, read_rows, real_table, truth

# Fewer rows don't hold both splits, a lateral image and a handful of findings.
MIN_ROWS = 20


def synthetic_chexpert(
    out: Path, *, rows: int, seed: int, size: int = 320, workers: int = 1, table: str = "auto"
) -> dict[str, object]:
    """Make the folder `out` with train.csv, valid.csv and `rows` pictures in all.

    size: about the short side in pixels. table: "real" takes whole patients of the table in the installed
    torchxrayvision, "drawn" draws them, "auto" takes the real one if it is there. The same arguments,
    whatever `workers`, give the same bytes.

    Returns {"rows": the table used ("real" or "drawn"), "train": images, "valid": images, "train_patients":
    n, "valid_patients": n}. Raises ValueError for options out of range and an `out` that exists and isn't
    empty; then and after any failure nothing is left behind.
    """
    check_options(
        out,
        {
            "rows": (rows, MIN_ROWS, None),
            "seed": (seed, 0, None),
            "size": (size, 64, 4096),
            "workers": (workers, 1, None),
        },
    )
    used, pool = _rows(table, rows, seed)
    train, valid = choose(pool, rows, np.random.default_rng((seed, 3)))
    # The official small set has its own folder name in the paths; every other folder is called like the large
    # one.
    folder = out.name if out.name == "CheXpert-v1.0-small" else "CheXpert-v1.0"
    tables: dict[str, list[Row]] = {"train": train, "valid": []}
    pictures = [_picture("train", row, truth(row, seed), seed, size) for row in train]
    for row in valid:
        present = truth(row, seed)
        tables["valid"].append(known(row, present))
        pictures.append(_picture("valid", row, present, seed, size))
    with new_folder(out) as draft:
        for split, chosen in tables.items():
            with open(draft / f"{split}.csv", "w", encoding="utf-8", newline="") as stream:
                writer = csv.writer(stream, lineterminator="\n")
                writer.writerow(HEADER)
                writer.writerows(row.cells(folder, split) for row in chosen)
        draw_all(draft, pictures, CHEXPERT_EFFECTS, workers)
    people = {f"{split}_patients": len({row.patient for row in chosen}) for split, chosen in tables.items()}
    return {"rows": used, "train": len(train), "valid": len(valid), **people}


def _rows(table: str, count: int, seed: int) -> tuple[str, list[Row]]:
    """(which table, rows to choose from)."""
    if table not in ("auto", "real", "drawn"):
        raise ValueError(f"--table is {table!r}; it must be auto, real or drawn.")
    file = real_table() if table != "drawn" else None
    if file is None:
        if table == "real":
            raise ValueError("The real table needs the package torchxrayvision; install it or use --table drawn.")
        # Many more than needed, so that rare findings can be chosen.
        return "drawn", draw_rows(np.random.default_rng((seed, 6)), max(20_000, 2 * count))
    rows = read_rows(file)
    if count > len(rows):
        raise ValueError(f"--rows is {count} and the real table has {len(rows)}; ask for fewer or use --table drawn.")
    return "real", rows


def _picture(split: str, row: Row, findings: dict[str, float], seed: int, size: int) -> Picture:
    """The picture of a row, which comes from the seed and the row alone."""
    image = (row.patient, row.study, zlib.crc32(row.file.encode()))
    return Picture(
        path=f"{split}/patient{row.patient:05d}/study{row.study}/{row.file}",
        findings=findings,
        view=row.view,
        sex=row.sex,
        age=row.age,
        size=film_size(np.random.default_rng((seed, 5, *image)), size),
        patient_seed=(seed, 0, row.patient),
        study_seed=(seed, 1, row.patient, row.study),
        image_seed=(seed, 2, *image),
    )

"""A tiny MIMIC-CXR-JPG 2.0.0 in its official layout."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

LABELS = [
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
]
LABEL_HEADER = ["subject_id", "study_id", *LABELS]
SPLIT_HEADER = ["dicom_id", "study_id", "subject_id", "split"]
METADATA_HEADER = [
    "dicom_id",
    "subject_id",
    "study_id",
    "PerformedProcedureStepDescription",
    "ViewPosition",
    "Rows",
    "Columns",
    "StudyDate",
    "StudyTime",
    "ProcedureCodeSequence_CodeMeaning",
    "ViewCodeSequence_CodeMeaning",
    "PatientOrientationCodeSequence_CodeMeaning",
]
VIEWS = ("PA", "LATERAL", "AP", "LL", "PA", "AP", "", "AP AXIAL", "LAO")
STUDY_DATES = ("21800506", "21801231")
"""Dates that the metadata table holds, and nothing that we write may."""


def write_mimic(root: Path, *, seed: int = 0, patients: int = 20, pixels: int = 40) -> Path:
    """Write the four tables, gzipped, and the images into `root`, and return it.

    patients: with one or two studies of one to three images each; about a tenth are of the split validate, as many of
    test. Every view of VIEWS occurs among 12 patients. Both label tables draw all four states, negbio others than
    chexpert. pixels: the images' side, 0 for none.
    """
    rng = np.random.default_rng(seed)
    metadata: list[list[str]] = []
    splits: list[list[str]] = []
    labels: dict[str, list[list[str]]] = {"chexpert": [], "negbio": []}
    for number in range(patients):
        subject = str(10000032 + 90_001 * number)  # so that the folders p10, p11, ... occur
        split = {7: "validate", 4: "test"}.get(number % 10, "train")
        for visit in range(1 + number % 2):
            study = str(50414267 + 1009 * number + visit)
            for table in labels.values():
                table.append(
                    [subject, study, *rng.choice(["1.0", "0.0", "-1.0", ""], len(LABELS), p=[0.2, 0.2, 0.1, 0.5])]
                )
            for _ in range(int(rng.integers(1, 4))):
                image = "-".join(f"{part:08x}" for part in rng.integers(0, 1 << 32, 5))
                view = VIEWS[len(metadata) % len(VIEWS)]
                date, meaning = STUDY_DATES[visit], "lateral" if view in ("LATERAL", "LL") else "postero-anterior"
                details = ["3056", "2544", date, "213014.531", "CHEST (PA AND LAT)", meaning, "Erect"]
                metadata.append([image, subject, study, "CHEST (PA AND LAT)", view, *details])
                splits.append([image, study, subject, split])
                if pixels:
                    path = root / f"files/p{subject[:2]}/p{subject}/s{study}/{image}.jpg"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    drawn = rng.integers(0, 256, (pixels, pixels), dtype=np.uint8)
                    Image.fromarray(drawn).save(path)
    write_table(root / "mimic-cxr-2.0.0-metadata.csv.gz", METADATA_HEADER, metadata)
    write_table(root / "mimic-cxr-2.0.0-split.csv.gz", SPLIT_HEADER, splits)
    for labeler, table in labels.items():
        write_table(root / f"mimic-cxr-2.0.0-{labeler}.csv.gz", LABEL_HEADER, table)
    return root


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a gzipped table."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))

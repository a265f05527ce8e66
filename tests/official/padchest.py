"""A tiny PadChest in its official layout."""

from __future__ import annotations

import csv
import gzip
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
# The first column has no name.
HEADER = (
    *("", "ImageID", "ImageDir", "StudyDate_DICOM", "StudyID", "PatientID", "PatientBirth", "PatientSex_DICOM"),
    *("ViewPosition_DICOM", "Projection", "MethodProjection", "Pediatric", "Modality_DICOM", "Manufacturer_DICOM"),
    *("PhotometricInterpretation_DICOM", "PixelRepresentation_DICOM", "PixelAspectRatio_DICOM"),
    *("SpatialResolution_DICOM", "BitsStored_DICOM", "WindowCenter_DICOM", "WindowWidth_DICOM", "Rows_DICOM"),
    *("Columns_DICOM", "XRayTubeCurrent_DICOM", "Exposure_DICOM", "ExposureInuAs_DICOM", "ExposureTime"),
    *("RelativeXRayExposure_DICOM", "ReportID", "Report", "MethodLabel", "Labels", "Localizations"),
    *("LabelsLocalizationsBySentence", "labelCUIS", "LocalizationsCUIS"),
)
# One token for each of the 27 findings, in their order.
TOKENS = (
    *("air trapping", "aortic atheromatosis", "aortic elongation", "laminar atelectasis", "bronchiectasis"),
    *("cardiomegaly", "consolidation", "costophrenic angle blunting", "pulmonary edema", "pleural effusion"),
    *("emphysema", "pulmonary fibrosis", "flattened diaphragm", "callus rib fracture", "calcified granuloma"),
    *("hemidiaphragm elevation", "hiatal hernia", "vascular hilar enlargement", "interstitial pattern"),
    *("pulmonary mass", "multiple nodules", "apical pleural thickening", "pneumonia", "pneumothorax", "scoliosis"),
    *("pacemaker", "tuberculosis"),
)
# Cells in every form that the table has.
SILENT = ("['unchanged']", "[' unchanged', '']", "['exclude']", "['suboptimal study']", "['']", "nan")
PROJECTIONS = ("PA", "L", "AP_horizontal", "AP", "COSTAL")


def write_padchest(
    root: Path,
    *,
    seed: int = 0,
    patients: int = 40,
    place: str = "dirs",
    pixels: int = 40,
    bits: int = 16,
    compressed: bool = True,
) -> Path:
    """Write table and images into `root`, and return it.

    patients: with one to three images each, the first of them with exactly one finding. place: where the images go:
    "dirs" (0/, 1/, ...), "zips" (0.zip, ...), or a folder such as "images" or ".". pixels: the images' side, 0 for
    none. bits: significant bits of their 16-bit pixels. compressed: the table ends in .csv.gz.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(patients):
        person = _digits(rng, 38)
        for number in range(int(rng.integers(1, 4))):
            first = number == 0
            own = TOKENS[patient % len(TOKENS)]
            words = [own] if first else [own, *rng.choice(TOKENS, 2).tolist(), "kyphosis", "", "normal"]
            labels = str([(" " * (at > 0)) + word for at, word in enumerate(words)])
            rows.append(row(len(rows), _digits(rng, 38), str(patient % 3), person, PROJECTIONS[number], labels))
    for at, cell in enumerate(SILENT):
        rows.append(row(len(rows), _digits(rng, 38), "2", _digits(rng, 38), PROJECTIONS[at % 5], cell))
    for at, projection in enumerate(("AP", "COSTAL", "EXCLUDE", "UNK")):
        rows.append(row(len(rows), _digits(rng, 38), str(at % 3), _digits(rng, 38), projection, "['normal']"))
    write_table(root, rows, compressed=compressed)
    if pixels:
        _write_images(root, rows, place, pixels, bits, rng)
    return root


def row(
    number: int, study: str, folder: str, patient: str, projection: str, labels: str, image: str = ""
) -> dict[str, str]:
    """A row of the table; its image is called <study>_<six characters>.png."""
    return dict.fromkeys(HEADER, "None") | {
        "": str(number),
        "ImageID": image or f"{study}_{'abcdefghijklmnopqrstuvwxyz'[number % 26]}{number:05d}.png",
        "ImageDir": folder,
        "StudyDate_DICOM": f"201{number % 8}0915",
        "StudyID": study,
        "PatientID": patient,
        "PatientBirth": "1930.0",
        "Projection": projection,
        "PhotometricInterpretation_DICOM": "MONOCHROME2",
        "BitsStored_DICOM": "12",
        "Report": " sin hallazg, patolog edad pacient .",
        "MethodLabel": "Physician",
        "Labels": labels,
        "LabelsLocalizationsBySentence": f"[{labels}]",
    }


def write_table(root: Path, rows: Sequence[dict[str, str]], *, compressed: bool = False) -> Path:
    """Write the table of `rows` into `root`; returns its path."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / (f"{TABLE}.gz" if compressed else TABLE)
    with gzip.open(path, "wt", newline="") if compressed else open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, HEADER, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def _digits(rng: np.random.Generator, count: int) -> str:
    return "".join(map(str, [int(rng.integers(1, 10)), *rng.integers(0, 10, count - 1).tolist()]))


def _write_images(
    root: Path, rows: Sequence[dict[str, str]], place: str, pixels: int, bits: int, rng: np.random.Generator
) -> None:
    for entry in rows:
        drawn = rng.integers(0, 2**bits, (pixels, pixels), dtype=np.uint16)
        drawn[0, :2] = 0, 2**bits - 1  # every image uses the full range
        stream = BytesIO()
        Image.fromarray(drawn).save(stream, "PNG")
        if place == "zips":
            with zipfile.ZipFile(root / f"{entry['ImageDir']}.zip", "a") as archive:
                archive.writestr(entry["ImageID"], stream.getvalue())
            continue
        folder = root / (entry["ImageDir"] if place == "dirs" else place)
        folder.mkdir(exist_ok=True)
        (folder / entry["ImageID"]).write_bytes(stream.getvalue())

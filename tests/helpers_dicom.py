"""DICOM files that tests write for themselves, with names and dates in their headers."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

# What must not leave the header.
SECRETS = ("Doe^Jane", "PAT-4711", "19610203", "20240506", "St. Elsewhere", "ACC-0815", "Dr. Who", "a nodule at left")


def dicom_dataset(values: np.ndarray, *, bits: int = 12, syntax: str = ExplicitVRLittleEndian, **attributes) -> Dataset:
    """A digital X-ray image of these stored values [rows, columns]; attributes replace or, with None, take out."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid()
    made = Dataset()
    made.file_meta = meta
    made.SOPClassUID, made.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    made.PatientName, made.PatientID, made.PatientBirthDate, made.StudyDate = SECRETS[:4]
    made.InstitutionName, made.AccessionNumber, made.ReferringPhysicianName, made.ImageComments = SECRETS[4:]
    allocated = 8 if bits <= 8 else 16
    made.Rows, made.Columns = values.shape
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit = allocated, bits, bits - 1
    made.PixelRepresentation = int(values.min() < 0)
    stored = values.astype(f"<{'i' if values.min() < 0 else 'u'}{allocated // 8}").tobytes()
    made.PixelData = stored + b"\0" * (len(stored) % 2)
    for name, value in attributes.items():
        if value is None:
            delattr(made, name)
        else:
            setattr(made, name, value)
    return made


def dicom_bytes(values: np.ndarray, **attributes: Any) -> bytes:
    """The file of `dicom_dataset`."""
    return dicom_file(dicom_dataset(values, **attributes))


def dicom_file(made: Dataset) -> bytes:
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, made, enforce_file_format=True)
    return buffer.getvalue()


def lookup(entries: list[int] | bytes, first: int, bits: int, count: int | None = None) -> Dataset:
    """An item of a modality or VOI LUT sequence."""
    item = Dataset()
    count = len(entries) if count is None else count
    item.LUTDescriptor = [count % 65536, first, bits]
    item.LUTData = entries if isinstance(entries, bytes) else np.array(entries, "<u2").tobytes()
    return item

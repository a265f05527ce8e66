"""DICOM pixels by the formulas of PS3.3 C.11 worked by hand, by pydicom's functions, and what must not get through."""

from __future__ import annotations

import io
import math
import sys
import tarfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from helpers_data import SALT, draw_image, make_chexpert
from helpers_dicom import SECRETS, dicom_bytes, dicom_dataset, dicom_file, lookup
from helpers_loader import source
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import pixels as by_pydicom
from pydicom import uid

from scaletransfer import dicom as module
from scaletransfer.decode import decode, image_size
from scaletransfer.dicom import DicomError, is_dicom, read_dicom, read_header
from scaletransfer.image_check import check_images, probe_areas
from scaletransfer.index import from_records, load_index
from scaletransfer.loader import ShardDataset
from scaletransfer.records import probe_images
from scaletransfer.shards import Encoding, build, plan_shards, verify
from scaletransfer.sources import open_source

VALUES = np.array([[0, 1, 1000, 2000, 2047, 2048, 3000, 4095]])
PNG = Encoding(encode="png")


def shown(values, **attributes) -> list[int]:
    return read_dicom(dicom_bytes(np.asarray(values), **attributes))[0].tolist()


# ---- values by hand


def test_without_a_window_all_stored_bits_are_the_range():
    """12 bits: value * 65535 / 4095 = value * 16.003663."""
    assert shown(VALUES) == [0, 16, 16004, 32007, 32759, 32776, 48011, 65535]
    assert read_dicom(dicom_bytes(VALUES)).dtype == np.uint16
    # signed: -2048..2047
    assert shown([[-2048, -2047, 0, 2047]]) == [0, 16, 32776, 65535]
    # 8 bits or fewer give 8: 6 bits, value * 255 / 63 = value * 4.047619
    assert shown([[0, 1, 40, 63]], bits=6) == [0, 4, 162, 255]
    assert read_dicom(dicom_bytes(np.array([[0, 200, 255]]), bits=8)).tolist() == [[0, 200, 255]]
    assert read_dicom(dicom_bytes(np.array([[7, 8]]), bits=8)).dtype == np.uint8
    # 16 bits stay as they are
    assert shown([[0, 1, 40_000, 65535]], bits=16) == [0, 1, 40_000, 65535]


def test_monochrome1_is_turned():
    assert shown(VALUES, PhotometricInterpretation="MONOCHROME1") == [
        65535 - value for value in (0, 16, 16004, 32007, 32759, 32776, 48011, 65535)
    ]
    assert shown([[0, 200, 255]], bits=8, PhotometricInterpretation="MONOCHROME1") == [255, 55, 0]


def test_a_linear_window():
    """C.11.2.1.2.1 with c = 2048, w = 2001: black up to 2047.5 - 1000, white above 2047.5 + 1000, and between
    ((x - 2047.5) / 2000 + 0.5) of 65535: 1048 -> 0.00025, 2047 -> 0.49975, 2048 -> 0.50025, 3047 -> 0.99975."""
    values = [[0, 1047, 1048, 2047, 2048, 3047, 3048, 4095]]
    wanted = [0, 0, 16, 32751, 32784, 65519, 65535, 65535]
    assert shown(values, WindowCenter=2048, WindowWidth=2001) == wanted
    assert shown(values, WindowCenter=2048, WindowWidth=2001, VOILUTFunction="LINEAR") == wanted
    # of several windows, the first
    assert shown(values, WindowCenter=[2048, 100], WindowWidth=[2001, 50]) == wanted
    # and into 8 bits: ((128 - 127.5) / 100 + 0.5) * 255 = 128.775
    assert shown([[0, 77, 128, 178, 255]], bits=8, WindowCenter=128, WindowWidth=101) == [0, 0, 129, 255, 255]


def test_the_narrowest_linear_window_is_a_threshold():
    assert shown([[99, 100, 101]], WindowCenter=100.5, WindowWidth=1) == [0, 0, 65535]


def test_a_linear_exact_window():
    """C.11.2.1.3.2 with c = 2048, w = 2000: ((x - 2048) / 2000 + 0.5) of 65535; 1049 -> 0.0005, 2048 -> 0.5."""
    values = [[0, 1048, 1049, 2048, 3048, 3049]]
    made = shown(values, WindowCenter=2048, WindowWidth=2000, VOILUTFunction="LINEAR_EXACT")
    assert made == [0, 0, 33, 32768, 65535, 65535]


def test_a_sigmoid_window():
    """C.11.2.1.3.1: 65535 / (1 + exp(-4 (x - c) / w)); at c + w / 4 it is 1 / (1 + 1/e) = 0.7310586."""
    values = [[0, 1000, 1500, 2000, 4000]]
    made = shown(values, WindowCenter=1000, WindowWidth=2000, VOILUTFunction="SIGMOID")
    assert made[1:4] == [32768, 47910, 57723]  # 0.5, 0.7310586, 0.8807971
    assert made[0] == math.floor(65535 / (1 + math.exp(2)) + 0.5) == 7812
    assert made[4] == math.floor(65535 / (1 + math.exp(-6)) + 0.5) == 65373


def test_a_rescale_comes_before_the_window():
    """That is x = 2 v - 1000 in the window 1000 +- 500: v = 1000 -> x = 1000 -> (1000 - 999.5) / 1000 + 0.5."""
    made = shown(
        [[0, 749, 1000, 1250, 4095]], RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=1000, WindowWidth=1001
    )
    assert made == [0, 0, 32800, 65535, 65535]  # 0.5005 * 65535 = 32800.3
    # alone it moves both ends of the range with the values
    assert shown(VALUES, RescaleSlope=0.5, RescaleIntercept=-300) == shown(VALUES)
    # a negative slope turns the picture; a window acts on what comes out
    assert shown([[0, 1000, 4095]], RescaleSlope=-1, RescaleIntercept=4095) == [65535, 49531, 0]
    assert shown(
        [[0, 95, 1095, 4095]], RescaleSlope=-1, RescaleIntercept=4095, WindowCenter=3500.5, WindowWidth=1001
    ) == [65535, 65535, 0, 0]


def test_a_modality_table_and_a_voi_table():
    table = lookup([0, 1000, 2000, 65535], first=10, bits=16)
    assert shown([[0, 10, 11, 12, 13, 4000]], ModalityLUTSequence=[table]) == [0, 0, 1000, 2000, 65535, 65535]
    # 12-bit entries: * 65535 / 4095; the table wins over the window
    voi = lookup([4095, 2048, 0], first=100, bits=12)
    made = shown([[0, 100, 101, 102, 999]], VOILUTSequence=[voi], WindowCenter=1, WindowWidth=2)
    assert made == [65535, 65535, 32776, 0, 0]
    # after a rescale: v + 50
    made = shown([[0, 50, 51, 52]], VOILUTSequence=[voi], RescaleSlope=1, RescaleIntercept=50)
    assert made == [65535, 65535, 32776, 0]
    # 8-bit entries, in bytes and in words; more places than 256
    entries = [min(255, place // 2) for place in range(512)]
    for content in (bytes(entries), entries):
        voi = lookup(content, first=0, bits=8, count=512)
        assert shown([[0, 100, 300, 511]], VOILUTSequence=[voi]) == [0, 50 * 257, 150 * 257, 65535]
    # 65536 entries are written as 0; a first place below zero
    full = lookup(list(range(65536)), first=-100, bits=16)
    assert shown([[-200, -100, 0, 7]], VOILUTSequence=[full]) == [0, 0, 100, 107]


# ---- against pydicom


@st.composite
def pictures(draw):
    bits = draw(st.sampled_from([6, 8, 10, 12, 15, 16]))
    signed = draw(st.booleans()) and bits > 8
    low = -(1 << (bits - 1)) if signed else 0
    high = low + (1 << bits) - 1
    values = draw(st.lists(st.integers(low, high), min_size=4, max_size=12))
    settings: dict = {"bits": bits, "PixelRepresentation": int(signed)}
    if draw(st.booleans()):
        settings |= {
            "RescaleSlope": draw(st.sampled_from([0.5, 1, 1.25, 4])),
            "RescaleIntercept": draw(st.integers(-2000, 500)),
        }
    if draw(st.booleans()):
        settings |= {
            "WindowCenter": draw(st.integers(low, high)),
            "WindowWidth": draw(st.integers(1, high - low + 1)),
            "VOILUTFunction": draw(st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"])),
        }
    return np.array([values]), settings


@settings(max_examples=150, deadline=None)
@given(pictures())
def test_values_are_those_of_pydicom_on_the_range_of_its_output(picture):
    values, attributes = picture
    dataset = pydicom.dcmread(io.BytesIO(dicom_bytes(values, **attributes)))
    made = by_pydicom.apply_voi_lut(by_pydicom.apply_modality_lut(dataset.pixel_array, dataset), dataset)
    low = -(1 << (dataset.BitsStored - 1)) if dataset.PixelRepresentation else 0
    ends = np.array([low, low + (1 << dataset.BitsStored) - 1], float)
    ends = ends * dataset.get("RescaleSlope", 1) + dataset.get("RescaleIntercept", 0)
    top = 255 if dataset.BitsStored <= 8 else 65535
    exact = (made - ends[0]) / (ends[1] - ends[0]) * top
    ours = read_dicom(dicom_bytes(values, **attributes))
    assert abs(ours - exact).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.RLELossless])
def test_other_transfer_syntaxes(syntax):
    values = np.random.default_rng(0).integers(0, 4096, (24, 30))
    made = dicom_dataset(values)
    if syntax == uid.RLELossless:
        made.compress(uid.RLELossless)
    elif syntax == uid.ExplicitVRBigEndian:
        made.file_meta.TransferSyntaxUID = syntax
        made.PixelData = values.astype(">u2").tobytes()
        made["PixelData"].VR = "OW"
    else:
        made.file_meta.TransferSyntaxUID = syntax
    assert np.array_equal(read_dicom(dicom_file(made)), read_dicom(dicom_bytes(values)))


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000"])
def test_compressed_by_what_pillow_reads(kind):
    """JPEG 2000 of 16 bits without loss, JPEG of 8."""
    ramp = np.linspace(0, 255 if kind == "JPEG" else 4095, 64 * 48).reshape(48, 64).astype(np.uint16)
    buffer = io.BytesIO()
    if kind == "JPEG":
        Image.fromarray(ramp.astype(np.uint8)).save(buffer, "JPEG", quality=100)
    else:
        Image.fromarray(ramp).save(buffer, "JPEG2000", irreversible=False, no_jp2=True)
    made = dicom_dataset(ramp, bits=8 if kind == "JPEG" else 16)
    made.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit if kind == "JPEG" else uid.JPEG2000Lossless
    made.PixelData = pydicom.encaps.encapsulate([buffer.getvalue()])
    made["PixelData"].is_undefined_length = True
    pixels = read_dicom(dicom_file(made)).astype(int)
    assert abs(pixels - ramp).max() <= (2 if kind == "JPEG" else 0)


def test_bits_that_are_not_stored_do_not_count():
    """Above the 12 bits some writers left overlays."""
    values = VALUES | 0xF000
    made = dicom_dataset(VALUES)
    made.PixelData = values.astype("<u2").tobytes()
    assert read_dicom(dicom_file(made)).tolist() == [shown(VALUES)]


# ---- what is refused


def _cut(data: bytes) -> bytes:
    return data[:-9]


REFUSED = {
    "several frames": {"NumberOfFrames": 2},
    "in colour": {"PhotometricInterpretation": "RGB"},
    "in colour, or of an unknown photometric": {"SamplesPerPixel": 3},
    "unknown photometric interpretation": {"PhotometricInterpretation": "PALETTE COLOR"},
    "without pixel data": {"PixelData": None},
    "without Rows, or its header is cut off": {"Rows": None},
    "without Columns": {"Columns": 0},
    "unknown form of pixels": {"HighBit": 12},
    "unknown form of pixels (bits": {"BitsAllocated": 32},
    "that is truncated": {"Rows": 2},
    "more pixel data than its size says": {"Columns": 5},
    "claims more pixels than can be real": {"Rows": 60_000, "Columns": 60_000},
    "rescale slope is 0": {"RescaleSlope": 0, "RescaleIntercept": 1},
    "only one of WindowCenter and WindowWidth": {"WindowCenter": 5},
    "window or VOI LUT function has no meaning": {"WindowCenter": 5, "WindowWidth": 0},
    "VOI LUT function has no meaning": {"WindowCenter": 5, "WindowWidth": 9, "VOILUTFunction": "CURVE"},
    "lookup table that is cut off": {"VOILUTSequence": [lookup([1, 2], 0, 12, count=9)]},
    "lookup table whose entries are larger": {"VOILUTSequence": [lookup([1, 5000], 0, 12)]},
    "lookup table of an unknown form": {"ModalityLUTSequence": [lookup([1, 2], 0, 32)]},
}


@pytest.mark.parametrize("reason", sorted(REFUSED))
def test_reasons(reason):
    data = dicom_bytes(VALUES, **REFUSED[reason])
    with pytest.raises(DicomError, match=reason.replace("(", r"\(")) as caught:
        read_dicom(data)
    with pytest.raises(ValueError, match=reason.replace("(", r"\(")):
        decode(data, 1)
    assert not [secret for secret in SECRETS if secret in str(caught.value)]


def test_a_compression_without_a_decoder_and_an_unknown_one():
    made = dicom_dataset(VALUES)
    made.PixelData = pydicom.encaps.encapsulate([b"\0" * 8])
    made["PixelData"].is_undefined_length = True
    for syntax, reason in (
        (uid.JPEGLSLossless, "compressed as JPEG-LS Lossless Image Compression, for which no decoder is installed"),
        (uid.MPEG2MPML, "of an unknown transfer syntax"),
        (uid.JPEG2000Lossless, "that is broken"),
    ):
        made.file_meta.TransferSyntaxUID = syntax
        with pytest.raises(DicomError, match=reason):
            read_dicom(dicom_file(made))


def test_a_deflated_file_is_not_inflated(monkeypatch):
    """By pydicom it would be, without a limit: to a thousand times the size of the file."""
    made = dicom_dataset(VALUES)
    made.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    data = dicom_file(made)
    monkeypatch.setattr(pydicom, "dcmread", None)
    for read in (read_dicom, read_header):
        with pytest.raises(DicomError, match="deflated"):
            read(data)


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(0, 3000), changes=st.dictionaries(st.integers(132, 3000), st.integers(0, 255), max_size=6))
def test_damaged_files_are_refused_or_read_and_nothing_else(cut, changes):
    whole = dicom_bytes(
        np.arange(400).reshape(20, 20),
        WindowCenter=100,
        WindowWidth=200,
        VOILUTSequence=[lookup([1, 2, 3], 0, 12)],
    )
    data = bytearray(whole)
    for place, value in changes.items():
        data[132 + place % (len(data) - 132)] = value
    for damaged in (bytes(data), whole[: max(132, cut)]):
        try:
            pixels = read_dicom(damaged)
        except DicomError as error:
            assert str(error).startswith("it is a DICOM file") and "\n" not in str(error)
            assert not [secret for secret in SECRETS if secret in str(error)]
            continue
        assert pixels.dtype in (np.uint8, np.uint16) and pixels.shape == read_header(damaged)[:2]


def test_it_is_known_by_its_magic():
    assert is_dicom(dicom_bytes(VALUES)) and not is_dicom(b"DICM") and not is_dicom(b"\0" * 131)
    with pytest.raises(DicomError, match=r"it is a DICOM file"):
        read_dicom(b"\0" * 128 + b"DICM")


def test_without_pydicom_one_sentence(tmp_path, monkeypatch):
    root = chest(tmp_path / "CheXpert-v1.0")
    data = next(root.rglob("*.dcm")).read_bytes()
    monkeypatch.setitem(sys.modules, "pydicom", None)
    monkeypatch.setitem(sys.modules, "pydicom.pixels", None)
    for ask in (
        lambda: decode(data, 1),
        lambda: image_size(data),
        lambda: plan_shards(open_source("chexpert", root), SALT, encoding=PNG),
        lambda: from_records(open_source("chexpert", root), SALT),
    ):
        with pytest.raises(ValueError, match=r"DICOM files need pydicom: pip install scaletransfer\[dicom\]"):
            ask()
    # hidden behind other names they are met only while shards are written
    for path in root.rglob("*.dcm"):
        path.rename(path.with_suffix(".jpg"))
    with pytest.raises(ValueError, match=r"\.jpg: DICOM files need pydicom"):
        build(plan_shards(open_source("chexpert", root), SALT, shard_size=4, encoding=PNG), tmp_path / "out")


# ---- decode, fine-tuning from files


def test_decode_and_size():
    values = np.arange(12).reshape(3, 4) * 300
    data = dicom_bytes(values)
    wanted = read_dicom(data)
    assert np.array_equal(decode(data, 1, 16)[0].numpy(), wanted)
    assert np.array_equal(decode(data, 1)[0].numpy(), np.round(wanted / 257))
    assert np.array_equal(decode(data, 3)[2].numpy(), np.round(wanted / 257))
    # its white is its own, not that of 12-bit PNGs beside it
    assert np.array_equal(decode(data, 1, 8, deep_white=4095)[0].numpy(), np.round(wanted / 257))
    assert int(decode(data, 1, 16, deep_white=4095, white=4095).numpy().max()) == 3300
    assert image_size(data) == (3, 4) and read_header(data) == (3, 4, 16)
    eight = dicom_bytes(np.array([[0, 9, 255]]), bits=8)
    assert decode(eight, 1)[0].tolist() == [[0, 9, 255]] and read_header(eight) == (1, 3, 8)
    assert decode(eight, 1, 16)[0].tolist() == [[0, 9 * 257, 65535]]


def chest(root: Path, **attributes) -> Path:
    """CheXpert's layout with DICOM files instead of its JPEGs."""
    make_chexpert(root, rows=12, valid=3, laterals=False, images=False)
    for number, record in enumerate(open_source("chexpert", root)):
        path = (root / record.image).with_suffix(".dcm")
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(number).integers(0, 4096, (20, 24))
        path.write_bytes(dicom_bytes(values, WindowCenter=2048, WindowWidth=3000, **attributes))
    return root


def test_fine_tuning_reads_them_as_files(tmp_path):
    root = chest(tmp_path / "CheXpert-v1.0")
    index = from_records(open_source("chexpert", root), SALT)
    info = index.image
    assert (info.channels, info.bit_depth, info.pixel_max, info.extension) == (1, 16, 65535, "dcm")
    rows = np.arange(len(index.table("train")))
    check_images([source(index)], [rows], channels=1, depth=16, workers=0)
    assert probe_areas(index, "train", rows).tolist() == [[20, 24]] * len(rows)
    data = ShardDataset([source(index)], None, lambda image: image, 1, 0)
    first = next(iter(open_source("chexpert", root)))
    wanted = read_dicom((root / first.image).with_suffix(".dcm").read_bytes())
    assert np.array_equal(data.__getitems__([0])["image"][0, 0].numpy(), wanted)
    # one that is broken, and one of 8 bits, by their header
    records = open_source("chexpert", root).locate(list(open_source("chexpert", root)))
    (root / records[2].image).write_bytes(dicom_bytes(VALUES, Rows=None))
    with pytest.raises(ValueError, match=r"\.dcm is not an image that can be read"):
        probe_images(root, records)
    (root / records[2].image).write_bytes(dicom_bytes(np.array([[1, 2]]), bits=8))
    assert probe_images(root, records[2:3]).bit_depth == 8


def test_a_long_header_is_read_to_its_end(tmp_path):
    """Some writers put pictures into private elements before the size."""
    made = dicom_dataset(VALUES)
    made.private_block(0x0019, "somebody", create=True).add_new(1, "OB", b"\0" * 100_000)
    (tmp_path / "1.jpg").write_bytes(dicom_file(made))
    with pytest.raises(DicomError):
        read_header(dicom_file(made)[: 64 * 1024])
    from helpers_loader import Findings

    opened = Findings(tmp_path)
    record = next(record for record in opened if record.image == "1.jpg")
    assert probe_images(tmp_path, [record]).bit_depth == 16


# ---- make_shards


def stored(out: Path) -> list[bytes]:
    found = []
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [tar.extractfile(m).read() for m in tar if not m.name.endswith(".json")]
    return found


def test_shards_hold_pixels_and_nothing_of_the_header(tmp_path):
    root = chest(tmp_path / "CheXpert-v1.0")
    with pytest.raises(ValueError, match="dcm images, which readers of shards don't read: convert them by --encode"):
        plan_shards(open_source("chexpert", root), SALT)
    index = build(plan_shards(open_source("chexpert", root), SALT, encoding=PNG), tmp_path / "out").index
    assert (index.image.extension, index.image.bit_depth, index.image.pixel_max) == ("png", 16, 65535)
    assert index.encoder["dicom"] == f"pydicom {pydicom.__version__}"
    files = {path.read_bytes() for path in root.rglob("*.dcm")}
    wanted = sorted(read_dicom(data).tobytes() for data in files)
    made = [np.asarray(Image.open(io.BytesIO(data))) for data in stored(tmp_path / "out")]
    assert {image.dtype for image in made} == {np.dtype(np.uint16)}
    assert sorted(image.tobytes() for image in made) == wanted
    identifiers = {str(pydicom.dcmread(io.BytesIO(data)).SOPInstanceUID) for data in files}
    assert len(identifiers) == len(files) and verify(tmp_path / "out") == []
    for path in (tmp_path / "out").iterdir():
        content = path.read_bytes()
        for secret in (*SECRETS, *identifiers, "DICM", "1.2.840.10008"):
            assert secret.encode() not in content, f"{secret} in {path}"


@pytest.mark.parametrize("encoding", [Encoding(encode="png", bit_depth=8), Encoding(encode="jpg", quality=100)])
def test_eight_bits(tmp_path, encoding):
    root = chest(tmp_path / "CheXpert-v1.0")
    index = build(plan_shards(open_source("chexpert", root), SALT, encoding=encoding), tmp_path / "out").index
    assert index.image.bit_depth == 8
    wanted = sorted(
        (np.round(read_dicom(path.read_bytes()) / 257).astype(int) for path in root.rglob("*.dcm")),
        key=lambda image: image.sum(),
    )
    made = [np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in stored(tmp_path / "out")]
    made.sort(key=lambda image: image.sum())
    if encoding.encode == "png":
        assert np.array_equal(made, wanted)
    else:
        assert abs(np.array(made).mean() - np.array(wanted).mean()) < 1
    content = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert not [secret for secret in SECRETS if secret.encode() in content]


def test_unusable_ones_are_quarantined_with_their_reasons(tmp_path):
    root = chest(tmp_path / "CheXpert-v1.0")
    paths = sorted((root / "train").rglob("*.dcm"))
    paths[0].write_bytes(dicom_bytes(VALUES, NumberOfFrames=7))
    paths[1].write_bytes(dicom_bytes(VALUES, PixelData=None))
    paths[2].write_bytes(dicom_bytes(VALUES)[:200])
    index = build(plan_shards(open_source("chexpert", root), SALT, encoding=PNG), tmp_path / "out").index
    reasons = sorted(entry["reason"] for entry in index.splits["train"].quarantine)
    assert reasons == [
        "it is a DICOM file with several frames",
        "it is a DICOM file without Rows, or its header is cut off",
        "it is a DICOM file without pixel data",
    ]
    assert index.splits["train"].samples == 9


def test_dicom_under_another_name_is_never_kept_as_it_is(tmp_path):
    root = make_chexpert(tmp_path / "CheXpert-v1.0", rows=6, valid=2, laterals=False, suffix=".png")
    record = next(iter(open_source("chexpert", root)))
    (root / record.image).write_bytes(dicom_bytes(np.arange(600).reshape(20, 30), bits=12))
    index = build(plan_shards(open_source("chexpert", root), SALT), tmp_path / "out").index
    (entry,) = index.splits["train"].quarantine
    assert entry["reason"] == "it is a DICOM file, which --encode png would convert"
    content = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert not [secret for secret in SECRETS if secret.encode() in content]
    eight = Encoding(encode="png", bit_depth=8)
    index = build(plan_shards(open_source("chexpert", root), SALT, encoding=eight), tmp_path / "png").index
    assert index.splits["train"].quarantine == () and index.encoder["range"] == 0


def test_its_range_is_its_own_beside_12_bit_files(tmp_path):
    """The pass that measures the range of PNGs does not take DICOM's stretched values for theirs."""
    root = make_chexpert(tmp_path / "CheXpert-v1.0", rows=4, valid=1, laterals=False, suffix=".png")
    for number, record in enumerate(open_source("chexpert", root)):
        if number == 2:
            (root / record.image).unlink()
            white = dicom_bytes(np.array([[0, 2048, 4095]]))
            (root / record.image).with_suffix(".dcm").write_bytes(white)
        else:
            Image.fromarray(np.array([[0, 512, 1023]], np.uint16)).save(root / record.image)
    plan = plan_shards(open_source("chexpert", root), SALT, encoding=Encoding(encode="png", bit_depth=8))
    build(plan, tmp_path / "out")
    assert load_index(tmp_path / "out").encoder["range"] == 1023
    made = sorted(np.asarray(Image.open(io.BytesIO(data))).ravel().tolist() for data in stored(tmp_path / "out"))
    assert made == [[0, 128, 255]] * 5


def test_pillow_is_not_asked_for_dicom(tmp_path, monkeypatch):
    """A file with two natures (PS3.10, annex A) is DICOM: its header would travel otherwise."""
    draw_image(tmp_path / "1.tif", 1)
    data = bytearray((tmp_path / "1.tif").read_bytes().ljust(200, b"\0"))
    data[128:132] = b"DICM"
    with pytest.raises(ValueError, match="DICOM"):
        decode(bytes(data), 1)
    assert module.is_dicom(bytes(data))

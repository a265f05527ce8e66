"""One reader for images as files, in plain tars, in zips and in the batches of CIFAR."""

from __future__ import annotations

import io
import multiprocessing
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from official.cifar10 import write_cifar10
from official.cifar100 import write_cifar100
from official.imagenet1k import tar
from PIL import Image

from scaletransfer import cifar_batches
from scaletransfer.image_files import file_of, image_size, read_image, zip_names
from scaletransfer.tars import members


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/1.png").write_bytes(b"one")
    (tmp_path / "t.tar").write_bytes(tar({"n.tar": tar({"2.JPEG": b"two two"})}))
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/3.png", b"three" * 100)
        archive.mkdir("y")
    return tmp_path


def test_files_spans_and_zips(root: Path) -> None:
    [outer] = members(root / "t.tar")
    [inner] = members(root / "t.tar", outer.offset, outer.size)
    span = (inner.offset, inner.size)
    for image, where, data in (
        ("d/1.png", None, b"one"),
        ("t.tar//n.tar//2.JPEG", span, b"two two"),
        ("z.zip//x/3.png", None, b"three" * 100),
    ):
        assert read_image(root, image, where) == data and image_size(root, image, where) == len(data)
    assert zip_names(root, "z.zip") == ["x/3.png"]
    assert file_of("t.tar//n.tar//2.JPEG") == "t.tar" and file_of("d/1.png") == "d/1.png"


def test_what_is_missing(root: Path) -> None:
    for image, span in (
        ("d/2.png", None),
        ("d/1.png/2.png", None),
        ("no.zip//3.png", None),
        ("z.zip//4.png", None),
        ("no.tar//2.JPEG", (0, 1)),
        ("d/cifar-10-python.tar.gz//cifar-10-batches-py/data_batch_1//1.png", None),
    ):
        assert image_size(root, image, span) == -1
        with pytest.raises((FileNotFoundError, NotADirectoryError)):
            read_image(root, image, span)
    assert image_size(root, "d") == -1
    size = (root / "t.tar").stat().st_size
    assert image_size(root, "t.tar//2.JPEG", (size - 1, 2)) == -1
    with pytest.raises(ValueError, match=r"t\.tar ends inside of t\.tar//2\.JPEG"):
        read_image(root, "t.tar//2.JPEG", (size - 1, 2))


@pytest.mark.parametrize(
    "image", ["../x.png", "/etc/passwd", "../z.zip//x/3.png", "../cifar-10-python.tar.gz//b//1.png"]
)
def test_nothing_outside_of_the_root(root: Path, image: str) -> None:
    for call in (read_image, image_size):
        with pytest.raises(ValueError, match="leaves the folder"):
            call(root / "d", image)


def test_archives_that_cannot_be_read(root: Path) -> None:
    (root / "bad.zip").write_bytes(b"no zip")
    (root / "images.tar.gz").write_bytes(b"")
    for image, words in (("bad.zip//1.png", "not a readable zip"), ("images.tar.gz//1.png", "can't be read one at a")):
        for call in (read_image, image_size):
            with pytest.raises(ValueError, match=words):
                call(root, image)
    whole = bytearray((root / "z.zip").read_bytes())
    whole[45:55] = b"?" * 10
    (root / "z2.zip").write_bytes(whole)
    with pytest.raises(ValueError, match=r"z2\.zip: x/3\.png is damaged"):
        read_image(root, "z2.zip//x/3.png")


CIFAR = {
    "packed": "cifar-10-python.tar.gz//cifar-10-batches-py/data_batch_2",
    "loose": "cifar-10-batches-py/data_batch_2",
}


def test_a_row_of_cifar_is_a_png_of_its_pixels(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    write_cifar10(tmp_path, archive=False)
    rows = cifar_batches.read_batch(tmp_path / CIFAR["loose"]).pixels("")
    for place in CIFAR.values():
        for row in (0, 7, 19):
            image = f"{place}//{row}.png"
            data = read_image(tmp_path, image)
            picture = Image.open(io.BytesIO(data))
            assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (32, 32))
            # the description on its page: 1,024 bytes of red, row by row, then green, then blue
            pixels = np.asarray(picture)
            for channel in range(3):
                expected = rows[row, channel * 1024 : (channel + 1) * 1024].reshape(32, 32)
                np.testing.assert_array_equal(pixels[:, :, channel], expected)
            assert data == read_image(tmp_path, image) and image_size(tmp_path, image) == 3072
        for name in ("20.png", "020.png", "-1.png", "1.jpg", "x.png"):
            with pytest.raises((FileNotFoundError, ValueError, NotADirectoryError)):
                read_image(tmp_path, f"{place}//{name}")
    with pytest.raises(FileNotFoundError, match="has 20 images, so none of the number 20"):
        read_image(tmp_path, f"{CIFAR['loose']}//20.png")
    with pytest.raises(FileNotFoundError, match="has no member cifar-10-batches-py/data_batch_6"):
        read_image(tmp_path, "cifar-10-python.tar.gz//cifar-10-batches-py/data_batch_6//0.png")


def test_a_size_opens_no_batch(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(b"no archive")
    image = "cifar-100-python.tar.gz//cifar-100-python/train//0.png"
    assert image_size(tmp_path, image) == 3072
    with pytest.raises(ValueError, match=r"not a readable tar\.gz"):
        read_image(tmp_path, image)


def test_an_archive_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By many threads, and again in no forked child; a changed one is read again."""
    write_cifar100(tmp_path)
    calls = []
    original = cifar_batches.packed_files
    monkeypatch.setattr(cifar_batches, "packed_files", lambda *a: calls.append(a) or original(*a))
    image = "cifar-100-python.tar.gz//cifar-100-python/test//3.png"
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(read_image(tmp_path, image))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 8 and len(calls) == 1
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_read_without_loading, (tmp_path, image)) == found[0]
    (tmp_path / "cifar-100-python.tar.gz").unlink()
    write_cifar100(tmp_path, seed=1)
    assert read_image(tmp_path, image) != found[0] and len(calls) == 2


def _read_without_loading(root: Path, image: str) -> bytes:
    def unexpected(*_: object) -> None:
        raise AssertionError("the archive was read again")

    cifar_batches.packed_files = unexpected
    return read_image(root, image)

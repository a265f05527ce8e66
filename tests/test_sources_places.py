from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaletransfer.image_files import read_image
from scaletransfer.sources.places import find_images

FOLDERS, ARCHIVES = ("images", "more/deep", "."), ("1.zip", "2.zip")
NAMES = ("a.png", "b.png", "c.png")


def put(root: Path, place: str, data: bytes = b"") -> None:
    archive, _, member = place.partition("//")
    if member:
        with zipfile.ZipFile(root / archive, "a") as file:
            file.writestr(member, data)
        return
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).write_bytes(data)


@settings(max_examples=60, deadline=None)
@given(
    chosen=st.sets(
        st.tuples(
            st.integers(0, len(FOLDERS) + len(ARCHIVES) - 1),
            st.sampled_from([*NAMES, *(name.replace(".png", ".dcm") for name in NAMES), "z.png"]),
        )
    )
)
def test_the_first_place_counts_and_dicom_after_all_of_them(chosen: set[tuple[int, str]]) -> None:
    where = [*(f"{folder}/" for folder in FOLDERS), *(f"{archive}//images/" for archive in ARCHIVES)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for place, name in chosen:
            put(root, where[place] + name, f"{place} {name}".encode())
        found = find_images(root, NAMES, FOLDERS, ARCHIVES)
        for name in NAMES:
            plain = [place for place, other in chosen if other == name]
            dicom = [place for place, other in chosen if other == name.replace(".png", ".dcm")]
            if plain:
                assert read_image(root, found[name]) == f"{min(plain)} {name}".encode()
            elif dicom:
                assert read_image(root, found[name]) == f"{min(dicom)} {name.replace('.png', '.dcm')}".encode()
            else:
                assert name not in found


def test_how_places_are_named(tmp_path: Path) -> None:
    for place in ("a.png", "images/b.png", "1.zip//c.png", "2.zip//images_001/images/d.png"):
        put(tmp_path, place, b"x")
    names = ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert find_images(tmp_path, names, FOLDERS, ARCHIVES) == {
        "a.png": "a.png",
        "b.png": "images/b.png",
        "c.png": "1.zip//c.png",
        "d.png": "2.zip//images_001/images/d.png",
    }


def test_folders_are_no_images_and_links_are(tmp_path: Path) -> None:
    (tmp_path / "images/a.png").mkdir(parents=True)
    put(tmp_path, "b.png", b"x")
    (tmp_path / "images/b.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "images/c.png").symlink_to(tmp_path / "nowhere")
    assert find_images(tmp_path, NAMES, FOLDERS) == {"b.png": "images/b.png"}


def test_archives_are_opened_only_while_an_image_is_missing(tmp_path: Path) -> None:
    (tmp_path / "1.zip").write_bytes(b"no zip")
    for name in NAMES:
        put(tmp_path, name)
    assert len(find_images(tmp_path, NAMES, FOLDERS, ARCHIVES)) == 3
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"1\.zip is not a readable zip file"):
        find_images(tmp_path, NAMES, FOLDERS, ARCHIVES)


def test_compressed_tars_have_to_be_extracted(tmp_path: Path) -> None:
    archives = ("1.zip", "1.tar.gz")
    put(tmp_path, "1.tar.gz", b"\x1f\x8b")
    put(tmp_path, "a.png")
    with pytest.raises(ValueError, match=r"2 images are missing and .*1\.tar\.gz can't be read .* extract it"):
        find_images(tmp_path, NAMES, FOLDERS, archives)
    put(tmp_path, "1.zip//b.png")
    put(tmp_path, "images/c.png")
    assert len(find_images(tmp_path, NAMES, FOLDERS, archives)) == 3

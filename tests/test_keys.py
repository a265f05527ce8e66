from __future__ import annotations

import hashlib
import hmac
import logging
import multiprocessing
import stat
from pathlib import Path

import pytest

from scaletransfer.keys import PUBLIC_SALT, default_salt_file, fingerprint, key, load_salt, patient_code

SALT = b"sixteen bytes ok"


def test_keys_are_the_documented_hash() -> None:
    digits = hmac.new(SALT, b"CheXpert-v1.0/train/a.jpg", hashlib.sha256).hexdigest()[:16]
    assert key("chexpert", "CheXpert-v1.0/train/a.jpg", SALT) == f"chexpert-{digits}"
    assert patient_code("chexpert", "patient00001", SALT) == hmac.new(SALT, b"patient00001", "sha256").hexdigest()[:16]
    assert patient_code("chexpert", "", SALT) == ""


def test_another_salt_gives_other_keys_and_fingerprints() -> None:
    assert key("nih", "1", SALT) != key("nih", "1", PUBLIC_SALT)
    assert fingerprint(SALT) != fingerprint(PUBLIC_SALT)
    assert len(fingerprint(SALT)) == 16 and int(fingerprint(SALT), 16) >= 0
    assert fingerprint(SALT) not in (key("nih", "1", SALT), SALT.hex()[:16])


@pytest.mark.parametrize("source", ["", "Che Xpert", "a-b", "../x", "a/b", "a.b"])
def test_a_source_name_must_fit_a_file_name(source: str) -> None:
    with pytest.raises(ValueError, match="source name"):
        key(source, "1", SALT)


def test_a_file_name_that_is_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="valid Unicode"):
        key("image_folder", "a\udcff.jpg", SALT)


def test_the_salt_is_made_once_and_is_private(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "new" / "salt"
    with caplog.at_level(logging.WARNING):
        first = load_salt(file)
    assert str(file) in caplog.text
    caplog.clear()
    assert load_salt(file) == load_salt(str(file)) == first and not caplog.text
    assert len(bytes.fromhex(first.decode())) == 32 and file.read_bytes().strip() == first
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["salt"]


def test_the_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert load_salt() == (tmp_path / "xdg/scaletransfer/salt").read_bytes().strip()
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")  # invalid by the XDG specification
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_salt_file() == tmp_path / "home/.config/scaletransfer/salt"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert default_salt_file() == tmp_path / "home/.config/scaletransfer/salt"


def test_white_space_around_the_salt_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "salt").write_bytes(b"\n " + SALT + b"\r\n")
    assert load_salt(tmp_path / "salt") == SALT


@pytest.mark.parametrize("content", [b"", b" \n", b"fifteen bytes !"])
def test_a_short_salt_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "salt").write_bytes(content)
    with pytest.raises(ValueError, match=r"salt holds \d+ bytes and needs at least 16"):
        load_salt(tmp_path / "salt")
    assert (tmp_path / "salt").read_bytes() == content


def test_a_salt_that_cannot_be_read_or_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="can't be read or made"):
        load_salt(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="can't be read or made"):
        load_salt(tmp_path / "file" / "salt")


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    salt = load_salt(tmp_path / "salt")
    assert load_salt(tmp_path / "salt") == salt
    assert [path.name for path in tmp_path.iterdir()] == ["salt"]


def _load(path: str) -> bytes:
    return load_salt(path)


def test_processes_that_start_together_share_one_salt(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        for number in range(5):
            assert len(set(pool.map(_load, [str(tmp_path / f"salt{number}")] * 6, chunksize=1))) == 1

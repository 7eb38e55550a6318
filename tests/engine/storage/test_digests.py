"""A file's sha256 is read once, and again whenever the file may have changed."""

import hashlib
import os
from pathlib import Path

import pytest

from rtdmd_cli.engine.storage import digests
from rtdmd_cli.engine.storage.digests import LARGE, file_digest


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A large file that was last changed an hour ago."""
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights.safetensors"
    path.write_bytes(bytes(LARGE))
    os.utime(path, ns=(0, 1_700_000_000_000_000_000))
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose contents are read from now on."""
    found: list[Path] = []
    read = digests._read
    monkeypatch.setattr(digests, "_read", lambda path: found.append(path) or read(path))  # type: ignore[func-returns-value]
    return found


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_large_file_is_read_once(file: Path, reads: list[Path]) -> None:
    assert file_digest(file) == file_digest(file) == sha256(file) and reads == [file]


def test_a_changed_file_is_read_again(file: Path, reads: list[Path], tmp_path: Path) -> None:
    file_digest(file)
    file.write_bytes(b"1" * LARGE)  # the same size, another time
    assert file_digest(file) == sha256(file)
    assert file_digest(file) == sha256(file) and len(reads) == 3  # changed just now: not noted yet
    os.utime(file, ns=(0, 1_700_000_001_000_000_000))
    file_digest(file)
    other = file.rename(tmp_path / "other.safetensors")
    assert file_digest(other) == sha256(other) and len(reads) == 5


def test_a_small_file_is_read_each_time(file: Path, reads: list[Path]) -> None:
    file.write_bytes(b"{}")
    os.utime(file, ns=(0, 0))
    file_digest(file), file_digest(file)
    assert len(reads) == 2 and not (file.parent / "cache").exists()


def test_a_damaged_note_is_passed_over(file: Path, reads: list[Path]) -> None:
    file_digest(file)
    for note in (file.parent / "cache/digests").iterdir():
        note.write_text("[")
    assert file_digest(file) == sha256(file) and len(reads) == 2

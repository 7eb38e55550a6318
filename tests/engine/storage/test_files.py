"""Writes are whole or absent, and trouble with the disk names the path."""

import errno
import os
import resource
from pathlib import Path

import pytest

from rtdmd_cli.engine.storage import files
from rtdmd_cli.errors import EnvironmentFailure


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writes_content_and_leaves_nothing_else(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a" / "b" / "t.txt", "grün\r\n")
    files.write_json(tmp_path / "a" / "j.json", {"b": 1, "a": [1.5, None]})
    assert (tmp_path / "a" / "b" / "t.txt").read_bytes() == "grün\r\n".encode()
    assert (tmp_path / "a" / "j.json").read_text() == '{\n  "a": [\n    1.5,\n    null\n  ],\n  "b": 1\n}\n'
    assert names(tmp_path / "a") == ["b", "j.json"]


def test_the_writer_gets_a_name_with_the_same_suffix_in_the_same_folder(tmp_path: Path) -> None:
    seen: list[Path] = []

    def writer(path: Path) -> None:
        seen.append(path)
        path.write_bytes(b"x")

    files.write_with(tmp_path / "p.png", writer)
    assert seen[0].parent == tmp_path
    assert seen[0].suffix == ".png"
    assert seen[0].name.startswith(files.TMP_PREFIX)


def test_a_failing_writer_leaves_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "t"
    files.write_bytes(target, b"old")

    def writer(path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("broken off")

    with pytest.raises(RuntimeError):
        files.write_with(target, writer)
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["t"]


def test_data_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", record_fsync)
    monkeypatch.setattr(files.os, "replace", record_replace)
    files.write_bytes(tmp_path / "t", b"x")
    assert calls == ["file", "rename", "folder"]


def test_a_full_disk_is_an_environment_failure_and_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "t"
    files.write_bytes(target, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(EnvironmentFailure, match="Cannot write .*/t: file too large"):
            files.write_bytes(target, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["t"]


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.ENOSPC, "Free"), (errno.EACCES, "may write"), (errno.EROFS, "read-only")]
)
def test_the_hint_fits_the_reason(number: int, hint: str, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailure) as caught, files.os_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path) in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.exit_code == 3


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for write in (
        lambda: files.write_text(tmp_path / "file" / "t", "x"),
        lambda: files.append_line(tmp_path / "file" / "t", "x"),
        lambda: files.make_folder(tmp_path / "file" / "deep" / "er"),
    ):
        with pytest.raises(EnvironmentFailure, match="/file"):
            write()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(EnvironmentFailure, match="permission denied"):
        files.write_text(closed / "t", "x")


def test_lines_are_appended_and_a_half_line_is_ended_first(tmp_path: Path) -> None:
    target = tmp_path / "new" / "log"
    files.append_line(target, "one")
    files.append_line(target, "zwei ä")
    assert target.read_text() == "one\nzwei ä\n"
    target.write_bytes(b"one\nhal")
    files.append_line(target, "two")
    assert target.read_bytes() == b"one\nhal\ntwo\n"
    with pytest.raises(ValueError, match="one line"):
        files.append_line(target, "a\nb")


def test_a_failed_append_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "log"
    files.append_line(target, "one")
    write = os.write
    room = [3]

    def full(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count, room[0] = write(descriptor, data[: room[0]]), 0
        return count

    monkeypatch.setattr(files.os, "write", full)
    with pytest.raises(EnvironmentFailure, match="no space left"):
        files.append_line(target, "second")
    assert target.read_bytes() == b"one\n"


def test_rename_folder_refuses_a_folder_with_content(tmp_path: Path) -> None:
    for name in ("new", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(name)
    with pytest.raises(EnvironmentFailure, match="not empty"):
        files.rename_folder(tmp_path / "new", tmp_path / "final")
    assert (tmp_path / "final" / "f").read_text() == "final"
    files.replace_folder(tmp_path / "new", tmp_path / "final")
    assert (tmp_path / "final" / "f").read_text() == "new"
    assert names(tmp_path) == ["final"]


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    temporary = files.tmp_path(tmp_path / "step-000001")
    temporary.mkdir()
    (temporary / "f").write_text("x")
    files.tmp_path(tmp_path / "t.json").write_text("x")
    (tmp_path / ".tmp-mine").write_text("x")
    (tmp_path / "t.json").write_text("x")
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == [".tmp-mine", "t.json"]

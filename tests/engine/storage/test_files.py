"""Writes are whole or absent, and trouble with the disk names the path."""

import errno
import fcntl
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rtdmd_cli.engine.storage import files
from rtdmd_cli.engine.storage.disk import Disk
from rtdmd_cli.engine.storage.disk_errors import os_errors
from rtdmd_cli.engine.storage.locks import is_held
from rtdmd_cli.errors import BusyError, EnvironmentFailure


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


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EIO])
def test_a_disk_without_a_flush_of_folders_can_be_written(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared folders refuse fsync of a folder; that of a file, or another fault, is still an error."""
    refused = os.path.isdir

    def fsync(descriptor: int) -> None:
        if refused(f"/dev/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    if number == errno.EIO:
        with pytest.raises(EnvironmentFailure, match="t.txt"):
            files.write_text(tmp_path / "t.txt", "new")
        return
    files.write_text(tmp_path / "a" / "t.txt", "new")
    assert (tmp_path / "a" / "t.txt").read_text() == "new"
    refused = os.path.isfile
    with pytest.raises(OSError, match=os.strerror(number)):
        Disk().flush_path(tmp_path / "a" / "t.txt")


def test_data_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
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
    ("number", "hint"),
    [
        (errno.ENOSPC, "Free"),
        (errno.EACCES, "permissions"),
        (errno.EROFS, "read-only"),
        (errno.EFBIG, "ulimit -f"),
    ],
)
def test_the_hint_fits_the_reason(number: int, hint: str, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailure) as caught, os_errors(tmp_path):
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


def test_lines_are_appended_in_the_place_of_a_half_one(tmp_path: Path) -> None:
    target = tmp_path / "new" / "log"
    files.append_line(target, "one")
    files.append_line(target, "zwei ä")
    assert target.read_text() == "one\nzwei ä\n"
    for half in (b"hal", 100_000 * b"x"):
        target.write_bytes(b"one\n" + half)
        files.append_line(target, "two")
        assert target.read_bytes() == b"one\ntwo\n"
        target.write_bytes(half)
        files.append_line(target, "two", keep_half=True)
        assert target.read_bytes() == half + b"\ntwo\n"
    target.write_bytes(b"half of the first")
    files.append_line(target, "two")
    assert target.read_bytes() == b"two\n"
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

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(EnvironmentFailure, match="no space left"):
        files.append_line(target, "second")
    assert target.read_bytes() == b"one\n"


def folder_with(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "f").write_text(text)
    return path


def test_rename_folder_refuses_a_folder_with_content(tmp_path: Path) -> None:
    for name in ("new", "final"):
        folder_with(tmp_path / name, name)
    with pytest.raises(EnvironmentFailure, match="not empty"):
        files.rename_folder(tmp_path / "new", tmp_path / "final")
    assert (tmp_path / "final" / "f").read_text() == "final"


class NoExchange(Disk):
    def exchange(self, one: Path, other: Path) -> bool:
        return False


@pytest.mark.parametrize("disk", [Disk(), NoExchange()], ids=["exchange", "two renames"])
@pytest.mark.parametrize("keep", [False, True])
def test_replace_folder_removes_the_one_it_replaces_and_nothing_else(
    disk: Disk, keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "disk", disk)
    folder_with(tmp_path / "final", "old")
    folder_with(tmp_path / "final.old", "mine")
    new = folder_with(files.tmp_path(tmp_path / "final"), "new")
    aside = files.replace_folder(new, tmp_path / "final", keep)
    assert (tmp_path / "final" / "f").read_text() == "new"
    assert (tmp_path / "final.old" / "f").read_text() == "mine"
    assert len(names(tmp_path)) == 2 + keep
    assert (aside is not None) == keep
    if aside is not None:
        assert aside.name.startswith("final.replaced-") and (aside / "f").read_text() == "old"


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder_with(files.tmp_path(tmp_path / "step-000001"), "x")
    files.tmp_path(tmp_path / "t.json").write_text("x")
    (tmp_path / ".tmp-mine").write_text("x")
    (tmp_path / "t.json").write_text("x")
    assert len(files.remove_leftovers(tmp_path, held=True)) == 2
    assert names(tmp_path) == [".tmp-mine", "t.json"]
    assert caplog.messages == [
        f"removed 2 files and folders that a killed process left half written in {tmp_path}"
    ]
    assert files.remove_leftovers(tmp_path, held=True) == [] and len(caplog.messages) == 1


def test_leftovers_of_processes_that_live_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final, dead = tmp_path / "final", [files.tmp_path(tmp_path / "a"), files.tmp_path(tmp_path / "final")]
    dead[0].write_text("left by a kill")
    folder_with(dead[1], "left by a kill")
    removed: list[str] = []

    def writer(temporary: Path) -> None:
        removed.extend(files.remove_leftovers(tmp_path))
        assert names(tmp_path) == sorted([alive.name, temporary.name])

    with files.building(final) as alive:
        files.write_with(tmp_path / "b", writer)
    assert sorted(removed) == sorted(path.name for path in dead)


def test_what_is_taken_for_dead_before_it_is_locked_is_made_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the making of a temporary file or folder and its lock another process cleans up."""
    real, cleaned = files.try_lock, []

    def late(descriptor: int, *kind: int) -> bool | None:
        if not cleaned:
            cleaned.append(None)
            cleaned.extend(files.remove_leftovers(tmp_path))
        return real(descriptor, *kind)

    monkeypatch.setattr(files, "try_lock", late)
    files.write_text(tmp_path / "a", "new")
    assert len(cleaned) == 2 and (tmp_path / "a").read_text() == "new"
    cleaned.clear()
    with files.building(tmp_path / "b") as folder:
        (folder / "f").write_text("new")
        files.rename_folder(folder, tmp_path / "b")
    assert len(cleaned) == 2 and names(tmp_path) == ["a", "b"]


def test_on_a_disk_without_locks_leftovers_go_by_their_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    young, old = files.tmp_path(tmp_path / "a"), files.tmp_path(tmp_path / "b")
    for path in (young, old):
        path.write_text("x")
    os.utime(old, (0, 0))
    assert files.remove_leftovers(tmp_path) == [old.name]


def test_two_processes_do_not_build_the_same_folder(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with files.building(final, fixed=True) as first:
        (first / "f").write_text("first")
        with (
            pytest.raises(BusyError, match="Another process is making .*final") as caught,
            files.building(final, fixed=True),
        ):
            raise AssertionError("two builders")
        assert caught.value.exit_code == 6
        assert (first / "f").read_text() == "first"
        files.rename_folder(first, final)
    assert names(tmp_path) == ["final"]
    folder_with(first, "left by a kill")
    with files.building(final, fixed=True) as second:
        assert names(second) == []
        files.replace_folder(second, final)
    assert names(tmp_path) == ["final"]


def test_a_folder_that_could_not_be_built_is_gone(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), files.building(tmp_path / "final") as folder:
        (folder / "f").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_nothing_is_appended_through_a_link_or_to_what_is_no_file(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "log").symlink_to(mine)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fifo")
    for name in ("log", "dangling", "fifo"):
        with pytest.raises(EnvironmentFailure, match=f"Cannot write .*/{name}: "):
            files.append_line(tmp_path / name, "planted")
    assert mine.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()
    files.write_text(tmp_path / "log", "new")  # takes the link's place
    assert mine.read_text() == "mine"


def test_a_librarys_own_writer_says_what_the_disk_said(tmp_path: Path) -> None:
    def writer(path: Path) -> None:
        save_file({"a": torch.zeros(1000)}, path / "no folder" / "f")

    with pytest.raises(EnvironmentFailure, match=r"Cannot write .*/t: "):
        files.write_with(tmp_path / "t", writer)
    assert names(tmp_path) == []


def test_a_held_folder_is_busy_for_others(tmp_path: Path) -> None:
    with files.locked(tmp_path, "Wait."):
        assert is_held(tmp_path)
        with pytest.raises(BusyError, match="is working on"), files.locked(tmp_path, "Wait."):
            raise AssertionError("two holders")
    assert not is_held(tmp_path)


def test_two_thousand_levels_of_folders_are_named_and_no_error_of_ours(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["a"] * 2_100)
    with pytest.raises(EnvironmentFailure, match="Cannot make the folder .*too long"):
        files.make_folder(deep)
    assert list(tmp_path.iterdir()) == []  # not a part of it
    files.make_folder(tmp_path.joinpath(*["b"] * 100))
    assert tmp_path.joinpath(*["b"] * 100).is_dir()

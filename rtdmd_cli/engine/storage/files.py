"""Every write of the product: temporary name in the same folder, flush to disk, rename, flush of the folder.

A reader, or a process started after a kill or a power cut, sees the old content or the new, never half of it.
Temporary names start with TMP_PREFIX; what a killed process left under one is removed at the next start (`remove_leftovers`).
OSError becomes EnvironmentFailure with the path in its message.
"""

import errno
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from platformdirs import user_cache_dir

from rtdmd_cli.engine.storage.disk import Disk
from rtdmd_cli.engine.storage.disk_errors import os_errors
from rtdmd_cli.engine.storage.locks import is_still, lock, open_folder, try_lock
from rtdmd_cli.errors import HINTS, BusyError, EnvironmentFailure

TMP_PREFIX = ".tmp-"
DEAD_AFTER = 24 * 3600.0
"""Seconds after which a temporary file counts as left by a killed process, on a disk that knows no locks."""

log = logging.getLogger(__name__)
disk = Disk()
"""What all writes go through; tests replace it."""

_TAIL = 65536  # bytes that are looked at in one go
_TMP_NAME = re.compile(re.escape(TMP_PREFIX) + "[0-9a-f]{8}-")


def cache_folder(name: str) -> Path:
    """The folder `name` in RTDMD_CACHE or the user's cache folder; it may not exist yet."""
    return Path(os.environ.get("RTDMD_CACHE") or user_cache_dir("rtdmd")) / name


def tmp_path(path: Path) -> Path:
    """A fresh temporary name beside `path`, with its suffix, by which some writers choose the format."""
    return path.with_name(f"{TMP_PREFIX}{secrets.token_hex(4)}-{path.name}")


def aside_path(path: Path) -> Path:
    """A fresh name beside `path` for what has to make room and is kept: `<name>.replaced-1a2b3c4d`."""
    return path.with_name(f"{path.name}.replaced-{secrets.token_hex(4)}")


def make_folder(path: Path) -> None:
    """Make a folder and its parents and flush the new names to disk; one that exists is left alone."""
    missing = []
    while not os.path.isdir(path) and path != path.parent:
        missing.append(path)
        path = path.parent
    if missing:
        _require_short(missing[0])
    for folder in reversed(missing):
        with os_errors(folder, "make the folder"):
            disk.make_folder(folder)
            disk.flush_path(folder.parent)


def _require_short(folder: Path) -> None:
    """EnvironmentFailure for a path that is too long for the system, before any part of it is made."""
    with os_errors(folder, "make the folder"):
        try:
            os.lstat(folder)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise


def write_with(path: Path, writer: Callable[[Path], None]) -> None:
    """Let `writer` fill a temporary path, an empty file, then make that the content of `path`. Missing parents are made.

    If anything fails, `path` is as before and the temporary file is gone.
    """
    _write(path, lambda temporary, descriptor: writer(temporary))


def write_bytes(path: Path, data: bytes) -> None:
    """Make `data` the content of `path`."""
    _write(path, lambda temporary, descriptor: disk.write(descriptor, data))


def _write(path: Path, fill: Callable[[Path, int], None]) -> None:
    """`fill` gets the temporary path and its descriptor, which is locked: others see that its process lives."""
    make_folder(path.parent)
    temporary, descriptor = _create_locked(path)
    try:
        with os_errors(path):
            fill(temporary, descriptor)
            disk.flush_path(temporary)
            disk.replace(temporary, path)
            disk.flush_path(path.parent)
    except BaseException:
        with suppress(OSError):
            disk.remove_file(temporary)
        raise
    finally:
        os.close(descriptor)


def _create_locked(path: Path) -> tuple[Path, int]:
    """A temporary file for `path`, and its locked descriptor.

    Once more where another process took it for a dead one's before it was locked, and removes it.
    """
    while True:
        temporary = tmp_path(path)
        with os_errors(path):
            descriptor = disk.create(temporary)
            if try_lock(descriptor) is not False and is_still(descriptor, temporary):
                return temporary, descriptor
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Make `text` the content of `path`, as UTF-8, line ends as they are."""
    write_bytes(path, text.encode())


def json_text(value: Any) -> str:
    """JSON with sorted keys and two spaces of indent; the same value gives the same text.

    Raises ValueError for nan and infinity, TypeError for values and keys that JSON has no form for.
    """
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Make `json_text(value)` the content of `path`."""
    write_text(path, json_text(value))


def append_line(path: Path, text: str, keep_half: bool = False) -> None:
    """As `append_lines`, for one line."""
    append_lines(path, [text], keep_half)


def append_lines(path: Path, texts: Sequence[str], keep_half: bool = False) -> None:
    """Append lines and flush them to disk together. Missing parents are made.

    A half line that a kill left at the end is removed first, so that all are whole for any reader; keep_half: it is ended
    and stays, for people. If the write fails, the file keeps its old length; a kill may leave the first ones of the
    lines. Raises ValueError if a text holds a line end.
    """
    for text in texts:
        if "\n" in text or "\r" in text:
            raise ValueError(f"one line each, got {text!r}")
    make_folder(path.parent)
    with os_errors(path):
        existed = os.path.lexists(path)
        descriptor = disk.open_to_append(path)
        try:
            _append(descriptor, "".join(f"{text}\n" for text in texts).encode(), keep_half)
        finally:
            os.close(descriptor)
        if not existed:
            disk.flush_path(path.parent)


def _append(descriptor: int, data: bytes, keep_half: bool) -> None:
    size = os.fstat(descriptor).st_size
    whole = _whole_lines(descriptor, size)
    if whole < size and keep_half:
        data = b"\n" + data
    elif whole < size:
        disk.truncate(descriptor, whole)
        size = whole
    try:
        disk.write(descriptor, data)
        disk.flush(descriptor)
    except OSError:
        with suppress(OSError):
            disk.truncate(descriptor, size)
        raise


def _whole_lines(descriptor: int, size: int) -> int:
    """Bytes up to the last line end."""
    while size:
        start = max(0, size - _TAIL)
        found = os.pread(descriptor, size - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        size = start
    return 0


@contextmanager
def building(final: Path, fixed: bool = False) -> Iterator[Path]:
    """A new temporary folder beside `final`, to be filled and then given that name by `rename_folder` or `replace_folder`.

    It is locked while it is filled, so that others leave it alone, and removed where the block raises.
    fixed: always the same name, so that two processes can't build the same folder: BusyError for the second.
    """
    make_folder(final.parent)
    path = final.with_name(f"{TMP_PREFIX}00000000-{final.name}") if fixed else tmp_path(final)
    descriptor = _claim(path, final, fixed)
    try:
        yield path
    except BaseException:
        with suppress(EnvironmentFailure):
            if is_still(descriptor, path):
                remove_folder(path)
        raise
    finally:
        os.close(descriptor)


def _claim(path: Path, final: Path, fixed: bool) -> int:
    """Make an empty folder and lock it; its descriptor. What a killed process left there is removed first.

    Once more where another process took it for a dead one's before it was locked, and removes it.
    """
    while True:
        make_folder(path)
        try:
            descriptor = open_folder(path)
        except EnvironmentFailure as error:
            if isinstance(error.__cause__, FileNotFoundError):
                continue
            raise
        try:
            free = try_lock(descriptor) is not False
            if not free and fixed:
                raise BusyError(f"Another process is making {final}.", "Wait for it, or choose another name.")
            if free and is_still(descriptor, path):
                with os_errors(path, "read"):
                    left = any(path.iterdir())
                if not left:
                    return descriptor
                remove_folder(path)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextmanager
def locked(folder: Path, hint: str, inner: Callable[[], Sequence[Path]] = tuple) -> Iterator[None]:
    """Hold a folder for this process, as `lock`, and remove what a killed one left half written there.

    inner: finds the folders in it where only its holder writes.
    """
    descriptor = open_folder(folder)
    try:
        lock(descriptor, f"Another process is working on {folder}.", hint)
        remove_leftovers(folder, *inner(), held=True)
        yield
    finally:
        os.close(descriptor)


def rename_folder(temporary: Path, final: Path) -> None:
    """Give a finished folder, its files already flushed, its final name, and flush the name.

    EnvironmentFailure if `final` exists and is not an empty folder; nothing is moved then.
    """
    with os_errors(final):
        disk.flush_path(temporary)
        disk.rename(temporary, final)
        disk.flush_path(final.parent)


def replace_folder(temporary: Path, final: Path, keep: bool = False) -> Path | None:
    """As rename_folder, but an existing `final` makes room and is removed; keep: it stays, under the name that is returned.

    Both change places at once, so that a complete folder is always there. Where the system can't do that, the old one
    lies under a name of its own (`aside_path`) for a moment.
    """
    if not os.path.lexists(final):
        rename_folder(temporary, final)
        return None
    aside = aside_path(final)
    if keep:  # from here on nothing of the old one has a name that is cleaned away
        move(temporary, aside)
        temporary = aside
    with os_errors(final):
        disk.flush_path(temporary)
        if not disk.exchange(temporary, final):
            aside = aside_path(final)
            disk.rename(final, aside)
            disk.rename(temporary, final)
            temporary = aside
        disk.flush_path(final.parent)
    if keep:
        return temporary
    remove_folder(temporary)
    return None


def move(source: Path, target: Path) -> None:
    """Give a folder or file another name, which nothing has, and flush both names."""
    with os_errors(target):
        disk.rename(source, target)
        disk.flush_path(target.parent)
        if source.parent != target.parent:
            disk.flush_path(source.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder, first giving it a temporary name: it is there whole or not at all."""
    doomed = path if _TMP_NAME.match(path.name) else tmp_path(path)
    with os_errors(path, "remove"):
        if doomed != path:
            disk.rename(path, doomed)
            disk.flush_path(path.parent)
        _remove(doomed)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        disk.remove_tree(path)
    else:
        disk.remove_file(path)


def remove_leftovers(*folders: Path, name: str | None = None, held: bool = False) -> list[str]:
    """Remove the temporary files and folders that an earlier, killed process left in the folders; the names removed.

    It is said in one line. name: only those that were to become this file or folder. held: the caller has locked the
    folders, so that nobody else writes there; else only what no process has locked goes. What can't be removed stays.
    """
    removed = [left for folder in folders for left in _remove_leftovers(folder, name, held)]
    if removed:
        what = "file or folder" if len(removed) == 1 else "files and folders"
        log.warning(
            "removed %d %s that a killed process left half written in %s", len(removed), what, folders[0]
        )
    return removed


def _remove_leftovers(folder: Path, name: str | None, held: bool) -> Iterator[str]:
    with os_errors(folder, "clean"):
        entries = list(folder.iterdir()) if folder.is_dir() else []
    for entry in entries:
        found = _TMP_NAME.match(entry.name)
        if not found or name not in (None, entry.name[found.end() :]):
            continue
        with suppress(OSError, EnvironmentFailure):
            if _remove_left(entry, held):
                yield entry.name


def _remove_left(path: Path, held: bool) -> bool:
    """Remove it if the process that wrote there has ended: nobody holds it, and it is held meanwhile; whether it did.

    On a disk without locks its age tells, where its folder isn't held.
    """
    if held:
        _remove(path)
        return True
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        free = try_lock(descriptor)
        if free is None:
            free = time.time() - path.lstat().st_mtime > DEAD_AFTER
        if free:
            _remove(path)
        return free
    finally:
        os.close(descriptor)


def require_room(folder: Path, size: int, what: str) -> None:
    """EnvironmentFailure if `size` bytes more don't fit the disk of `folder`, naming both figures. what: is to be written."""
    with os_errors(folder, "read"):
        status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if status.f_blocks and size > free:  # some network disks know no sizes
        raise EnvironmentFailure(
            f"{what} needs {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free on the disk of {folder}.",
            HINTS[errno.ENOSPC],
        )

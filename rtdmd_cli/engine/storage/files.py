"""Every write of the product: temporary name in the same folder, flush to disk, rename, flush of the folder.

A reader, or a process started after a kill or a power cut, sees the old content or the new, never half of it.
Temporary names start with TMP_PREFIX. OSError becomes EnvironmentFailure with the path in its message.
"""

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from platformdirs import user_cache_dir

from rtdmd_cli.errors import EnvironmentFailure

TMP_PREFIX = ".tmp-"
OLD_SUFFIX = ".old"

_TMP_NAME = re.compile(re.escape(TMP_PREFIX) + "[0-9a-f]{8}-")
_HINTS = {
    errno.ENOSPC: "Free some disk space, or choose a folder on another disk.",
    errno.EDQUOT: "Your disk quota is used up: free some space, or choose a folder on another disk.",
    errno.EACCES: "Choose a folder you may write to.",
    errno.EPERM: "Choose a folder you may write to.",
    errno.EROFS: "The disk is mounted read-only: choose another folder.",
}


def cache_folder(name: str) -> Path:
    """The folder `name` in RTDMD_CACHE or the user's cache folder; it may not exist yet."""
    return Path(os.environ.get("RTDMD_CACHE") or user_cache_dir("rtdmd")) / name


@contextmanager
def os_errors(path: Path, doing: str = "write") -> Iterator[None]:
    """Turn an OSError of the block into EnvironmentFailure: "Cannot <doing> <path>: <reason>."."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        hint = _HINTS.get(error.errno or 0, "Check this path, or choose another folder.")
        raise EnvironmentFailure(f"Cannot {doing} {path}: {reason}.", hint) from error


def tmp_path(path: Path) -> Path:
    """A fresh temporary name beside `path`, with its suffix, by which some writers choose the format."""
    return path.with_name(f"{TMP_PREFIX}{secrets.token_hex(4)}-{path.name}")


def make_folder(path: Path) -> None:
    """Make a folder and its parents and flush the new names to disk; one that exists is left alone."""
    if os.path.isdir(path):
        return
    make_folder(path.parent)
    with os_errors(path, "make the folder"):
        path.mkdir(exist_ok=True)
        _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Flush a folder's entries (names, not contents of files) to disk."""
    with os_errors(path):
        _fsync(path)


def write_with(path: Path, writer: Callable[[Path], None]) -> None:
    """Let `writer` fill a temporary path, then make that the content of `path`. Missing parents are made.

    If anything fails, `path` is as before and the temporary file is gone.
    """
    make_folder(path.parent)
    temporary = tmp_path(path)
    try:
        with os_errors(path):
            writer(temporary)
            _fsync(temporary)
            os.replace(temporary, path)
            _fsync(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Make `data` the content of `path`."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_with(path, write)


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


def append_line(path: Path, text: str) -> None:
    """As `append_lines`, for one line."""
    append_lines(path, [text])


def append_lines(path: Path, texts: Sequence[str]) -> None:
    """Append lines and flush them to disk together. Missing parents are made.

    A half line left by a kill is ended first. If the write fails, the file keeps its old length; a kill may leave the
    first ones of the lines. Raises ValueError if a text holds a line end.
    """
    for text in texts:
        if "\n" in text or "\r" in text:
            raise ValueError(f"one line each, got {text!r}")
    make_folder(path.parent)
    with os_errors(path):
        existed = path.exists()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            _append(descriptor, "".join(f"{text}\n" for text in texts).encode())
        finally:
            os.close(descriptor)
        if not existed:
            _fsync(path.parent)


def _append(descriptor: int, data: bytes) -> None:
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        data = b"\n" + data
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise


def rename_folder(temporary: Path, final: Path) -> None:
    """Give a finished folder, its files already flushed, its final name, and flush the name.

    EnvironmentFailure if `final` exists and is not an empty folder; nothing is moved then.
    """
    with os_errors(final):
        _fsync(temporary)
        os.rename(temporary, final)
        _fsync(final.parent)


def replace_folder(temporary: Path, final: Path) -> None:
    """As rename_folder, but an existing `final` is moved aside to `<final>.old` and removed afterwards.

    At every moment a complete folder lies under one of the two names.
    """
    aside = final.with_name(final.name + OLD_SUFFIX)
    if os.path.lexists(final):
        if os.path.lexists(aside):
            remove_folder(aside)
        with os_errors(final):
            os.rename(final, aside)
    rename_folder(temporary, final)
    if os.path.lexists(aside):
        remove_folder(aside)


def remove_folder(path: Path) -> None:
    """Remove a folder, first giving it a temporary name: it is there whole or not at all."""
    doomed = tmp_path(path)
    with os_errors(path, "remove"):
        os.rename(path, doomed)
        _fsync(path.parent)
        _remove(doomed)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files and folders that an earlier, killed process left in `folder`.

    name: only those that were to become this file or folder.
    """
    with os_errors(folder, "clean"):
        for entry in folder.iterdir():
            found = _TMP_NAME.match(entry.name)
            if found and name in (None, entry.name[found.end() :]):
                _remove(entry)

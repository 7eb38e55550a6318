"""Folders that one process holds: the system lifts a lock when the process ends, however it ends, and no file is made."""

import errno
import fcntl
import os
from pathlib import Path

from rtdmd_cli.engine.storage.disk_errors import os_errors
from rtdmd_cli.errors import BusyError, EnvironmentFailure

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.EBADF)
"""The disk knows no locks; EBADF: NFS, which locks no folders."""


def open_folder(path: Path) -> int:
    """A folder's descriptor, to be locked and closed."""
    with os_errors(path, "open"):
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def lock(descriptor: int, message: str, hint: str) -> None:
    """Lock a folder that is open. The system lifts the lock when the process ends, however it ends; no file is made.

    BusyError with `message` and `hint` where another process holds it. On a disk without locks nothing happens.
    """
    if try_lock(descriptor) is False:
        raise BusyError(message, hint)


def try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool | None:
    """Whether the folder is locked now: False where another process holds it, None where the disk knows no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise EnvironmentFailure(f"Cannot lock a folder: {error.strerror}.") from error
        return None
    return True


def is_held(folder: Path) -> bool:
    """Whether a process, this one or another, holds the folder."""
    with os_errors(folder, "open"):
        return _probe(folder.resolve()) is False


def _probe(path: Path) -> bool | None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return try_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def is_still(descriptor: int, path: Path) -> bool:
    """Whether the folder that is open is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False

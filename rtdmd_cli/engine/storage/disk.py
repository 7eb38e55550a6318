"""The calls that change a disk, all of them in one place.

`files` alone uses them. A test puts another `Disk` there, which fails or dies at its k-th call, or forgets what was not
flushed yet.
"""

import ctypes
import errno
import os
import shutil
import stat
import sys
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


class Disk:
    """Each method is one call of the system, or as near to one as it gets. Raises OSError."""

    def create(self, path: Path) -> int:
        """A new, empty file; its descriptor. FileExistsError where there is anything of that name."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)

    def open_to_append(self, path: Path) -> int:
        """A file's descriptor; it is made where there is none. Links and what is no file are refused."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o666)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is no plain file", str(path))
        return descriptor

    def write(self, descriptor: int, data: bytes) -> None:
        """All of `data`, at the end of the file."""
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]

    def truncate(self, descriptor: int, size: int) -> None:
        """Cut the file to `size` bytes."""
        os.ftruncate(descriptor, size)

    def flush(self, descriptor: int) -> None:
        """Have the file's content on the disk."""
        os.fsync(descriptor)

    def flush_path(self, path: Path) -> None:
        """Have a file's content, or a folder's names, on the disk.

        Folders shared with another system (VirtualBox, WSL, some of SMB) have no such call for a folder: their system writes
        names when it will, and a power cut may lose the last of them. Without this no command could write there at all.
        """
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_FLUSH or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise
        finally:
            os.close(descriptor)

    def make_folder(self, path: Path) -> None:
        """A new folder; one that is there is left alone."""
        path.mkdir(exist_ok=True)

    def replace(self, source: Path, target: Path) -> None:
        """Give a file another name; a file of that name is replaced."""
        os.replace(source, target)

    def rename(self, source: Path, target: Path) -> None:
        """Give a folder another name; only an empty folder may have it already."""
        os.rename(source, target)

    def exchange(self, one: Path, other: Path) -> bool:
        """Give each the other's name, at once. False where the system or the disk can't: nothing has happened then."""
        if not sys.platform.startswith("linux"):
            return False
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            rename = libc.renameat2  # glibc 2.28
        except AttributeError:
            return False
        paths = (os.fsencode(one), os.fsencode(other))
        if rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
            return True
        number = ctypes.get_errno()
        if number in _NO_EXCHANGE:
            return False
        raise OSError(number, os.strerror(number), str(other))

    def remove_file(self, path: Path) -> None:
        """Remove a file or a link."""
        path.unlink()

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and what is in it; links are not followed."""
        shutil.rmtree(path)

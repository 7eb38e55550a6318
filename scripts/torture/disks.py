"""Disks for trials: one that counts its calls, one that kills the process at one of them."""

import os
import signal
from pathlib import Path
from typing import Any

from rtdmd_cli.engine.storage.disk import Disk
from rtdmd_cli.engine.storage.files import TMP_PREFIX

CALLS = tuple(name for name in vars(Disk) if not name.startswith("_"))


class HookedDisk(Disk):
    """Calls `before` with the name of each call of the disk."""

    def __getattribute__(self, name: str) -> Any:
        if name in CALLS:
            self.before(name)
        return super().__getattribute__(name)

    def before(self, name: str) -> None:
        """Nothing yet."""


class WatchingDisk(HookedDisk):
    """Counts the writes to files that stand alone: not in a folder that gets its name when it is whole."""

    def __init__(self) -> None:
        self.alone, self.writes = set[int](), 0

    def create(self, path: Path) -> int:
        """See `Disk`."""
        return self._noted(super().create(path), path)

    def open_to_append(self, path: Path) -> int:
        """See `Disk`."""
        return self._noted(super().open_to_append(path), path)

    def write(self, descriptor: int, data: bytes) -> None:
        """See `Disk`."""
        self.writes += descriptor in self.alone
        super().write(descriptor, data)

    def _noted(self, descriptor: int, path: Path) -> int:
        if TMP_PREFIX in path.parent.as_posix():
            self.alone.discard(descriptor)
        else:
            self.alone.add(descriptor)
        return descriptor


class CountingDisk(WatchingDisk):
    """Keeps the number of calls in a file, and that of writes to files that stand alone in `writes` beside it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.count = path, 0

    def before(self, name: str) -> None:
        self.count += 1
        self.path.write_text(str(self.count))

    def write(self, descriptor: int, data: bytes) -> None:
        """See `Disk`."""
        super().write(descriptor, data)
        self.path.with_name("writes").write_text(str(self.writes))


class KillingDisk(WatchingDisk):
    """SIGKILL in the place of the `call`-th call, of a write after half of its data.

    alone: the calls are the writes to files that stand alone.
    """

    def __init__(self, call: int, alone: bool = False) -> None:
        super().__init__()
        self.call, self.only_alone, self.count = call, alone, 0

    def before(self, name: str) -> None:
        self.count += 1
        if not self.only_alone and self.count == self.call and name != "write":
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self, descriptor: int, data: bytes) -> None:
        """See `Disk`."""
        count = self.writes + (descriptor in self.alone) if self.only_alone else self.count
        if count == self.call and (descriptor in self.alone or not self.only_alone):
            super().write(descriptor, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(descriptor, data)

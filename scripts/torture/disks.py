"""Disks for trials: one that counts its calls, one that kills the process at one of them."""

import os
import signal
from pathlib import Path
from typing import Any

from rtdmd_cli.engine.storage.disk import Disk

CALLS = tuple(name for name in vars(Disk) if not name.startswith("_"))


class HookedDisk(Disk):
    """Calls `before` with the name of each call of the disk."""

    def __getattribute__(self, name: str) -> Any:
        if name in CALLS:
            self.before(name)
        return super().__getattribute__(name)

    def before(self, name: str) -> None:
        """Nothing yet."""


class CountingDisk(HookedDisk):
    """Keeps the number of calls in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0

    def before(self, name: str) -> None:
        self.count += 1
        self.path.write_text(str(self.count))


class KillingDisk(HookedDisk):
    """SIGKILL in the place of the `call`-th call, of a write after half of its data."""

    def __init__(self, call: int) -> None:
        self.left = call

    def before(self, name: str) -> None:
        self.left -= 1
        if self.left == 0 and name != "write":
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self, descriptor: int, data: bytes) -> None:
        """See `Disk`."""
        if self.left == 0:
            super().write(descriptor, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(descriptor, data)

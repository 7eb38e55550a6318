"""The torture on a program whose single files are written where they lie, which it has to find."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from rtdmd_cli.engine.storage import files
from scripts.torture import __main__ as torture


def write_in_place(path: Path, fill: Callable[[Path, int], None]) -> None:
    """In the place of `files._write`."""
    files.make_folder(path.parent)
    descriptor = files.disk.open_to_append(path)
    try:
        files.disk.truncate(descriptor, 0)
        fill(path, descriptor)
        files.disk.flush(descriptor)
    finally:
        os.close(descriptor)


def main() -> int:
    """See `scripts.torture`."""
    files._write = write_in_place
    return torture.main()

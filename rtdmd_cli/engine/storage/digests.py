"""sha256 of large files, read once: a small cache keyed by path, size and time of change.

    <cache>/digests/<sha256 of the path, 24 digits>.json    {"path", "size", "mtime_ns", "sha256"}

Small files are read each time. A file that has changed within the last seconds is not noted: it may change again
without its time of change telling.
"""

import contextlib
import hashlib
import time
from pathlib import Path

from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.engine.storage.files import cache_folder, write_json
from rtdmd_cli.errors import EnvironmentFailure

LARGE = 2**20
"""Bytes from which a digest is noted."""
SETTLED = 5.0
"""Seconds after its last change from which a file's digest is noted."""


def file_digest(path: Path) -> str:
    """sha256 of a file's content, 64 hexadecimal digits; OSError where it can't be read."""
    status = path.stat()
    if status.st_size < LARGE:
        return _read(path)
    where = str(path.resolve())
    known = {"path": where, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    note = cache_folder("digests") / f"{hashlib.sha256(where.encode()).hexdigest()[:24]}.json"
    with contextlib.suppress(
        OSError, ValueError, EnvironmentFailure
    ):  # none yet, or a damaged one: read the file
        noted = strict_json.read(note)
        if isinstance(noted, dict) and known.items() <= noted.items() and len(noted.get("sha256", "")) == 64:
            return str(noted["sha256"])
    digest = _read(path)
    now = path.stat()
    same = (now.st_size, now.st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    if same and time.time() - status.st_mtime > SETTLED:
        with contextlib.suppress(
            EnvironmentFailure
        ):  # without a cache that can be written it takes longer, no more
            write_json(note, known | {"sha256": digest})
    return digest


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

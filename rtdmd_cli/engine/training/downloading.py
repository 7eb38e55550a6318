"""Weights that the hub has to send first, and how much of them has come."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rtdmd_cli.engine.compute.signals import stop_on_signals
from rtdmd_cli.engine.rewards import needed
from rtdmd_cli.engine.rewards.fetch import Fetched, Wanted, fetch
from rtdmd_cli.engine.rewards.local import cache_folder, readable
from rtdmd_cli.engine.training.clock import duration
from rtdmd_cli.engine.training.heartbeat import under_way

BLOCK = 512  # bytes, the unit of st_blocks


def bring(missing: Sequence[Wanted], say: Callable[[str], None]) -> None:
    """Download what is missing, one after the other; the heartbeat tells how much has come. A signal ends it at once.

    EnvironmentFailure, as `needed.require`, where the hub can't be reached, and as `fetch` where it does not deliver.
    """
    needed.require(missing)
    with stop_on_signals() as stop, stop.during("", "files that have come whole are kept"):
        stop.check()
        for each in missing:
            say(f"downloading {needed.described(each)}")
            download(each)


def download(wanted: Wanted) -> Fetched:
    """As `fetch`, with the heartbeat telling how much has come."""
    under_way(Arriving(cache_folder(wanted.source), needed.size_of(wanted)))
    return fetch(wanted)


class Arriving:
    """Says how much of a repository is in the hub's cache: "downloading: 3.2 of about 16.0 GB, left 4:10".

    folder: of the repository in the cache; size: bytes of what is fetched, None where nobody knows.
    """

    def __init__(self, folder: Path, size: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._size, self._clock = folder, size, clock
        self._began, self._before = clock(), arrived(folder)

    def __call__(self) -> str:
        there = arrived(self._folder)
        if self._size is None:
            return f"downloading: {readable(there)}"
        text = f"downloading: {readable(there)} of about {readable(self._size)}"
        fresh, missing = there - self._before, self._size - there
        if fresh <= 0 or missing <= 0:
            return text
        return f"{text}, left {duration((self._clock() - self._began) * missing / fresh)}"


def arrived(folder: Path) -> int:
    """Bytes of a repository's files in the hub's cache, also of those that are not whole yet."""
    total = 0
    for path in (folder / "blobs").glob("*"):
        try:
            found = path.stat()
        except FileNotFoundError:  # it has got its final name meanwhile
            continue
        total += min(
            found.st_size, found.st_blocks * BLOCK
        )  # a file may have its whole length from the beginning
    return total

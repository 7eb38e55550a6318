"""Signs of life while something takes long: what was said last, and how long ago. No torch.

On a terminal a line that rewrites itself every second, from the third second on; in a log a line after half a minute, and then
each time the silence has doubled.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rtdmd_cli.engine.training.clock import duration

COLUMNS = 80  # that a line has room in
SILENT_SECONDS = 3.0
LOG_SECONDS = 30.0
EVERY_SECONDS = 1.0
CLEAR = "\r\x1b[K"
"""Goes back to the beginning of a terminal's line, and empties it."""


class Heartbeat:
    """What is under way, and since when. show: prints a line; stream: where the lines go, which may be a terminal."""

    def __init__(self, show: Callable[[str], None], stream: TextIO, clock: Callable[[], float]) -> None:
        self._show, self._stream, self._clock = show, stream, clock
        self._terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._lock = threading.RLock()
        self._text: str | Callable[[], str] = ""
        self._since = clock()
        self._next = LOG_SECONDS
        self._drawn = False
        self.resting = False

    def say(self, text: str) -> None:
        """A line, from which on the silence counts."""
        with self._lock:
            self.clear()
            self._show(text)
            self.under_way(text)

    def under_way(self, text: str | Callable[[], str]) -> None:
        """What goes on from now on, without a line; a function is asked at each beat."""
        with self._lock:
            self._text, self._since, self._next = text, self._clock(), LOG_SECONDS

    def beat(self) -> None:
        """Show that it goes on, where it has been silent for long enough."""
        with self._lock:
            silent = self._clock() - self._since
            if self.resting or not self._text:
                return
            if self._terminal and silent >= SILENT_SECONDS:
                print(f"{CLEAR}{self._line(silent)}", end="", file=self._stream, flush=True)
                self._drawn = True
            elif not self._terminal and silent >= self._next:
                self._next = 2 * silent
                self._show(self._line(silent))

    def _line(self, silent: float) -> str:
        text = self._text if isinstance(self._text, str) else self._text()
        return f"{duration(silent)} since: {text}"[:COLUMNS]

    def clear(self) -> None:
        """Take the line of a terminal away."""
        with self._lock:
            if self._drawn:
                print(CLEAR, end="", file=self._stream, flush=True)
            self._drawn = False


_beating: list[Heartbeat] = []
"""The heartbeat of the process, as it has one stderr."""


@contextmanager
def heartbeat(
    show: Callable[[str], None],
    quiet: bool,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
    every: float = EVERY_SECONDS,
) -> Iterator[Callable[[str], None]]:
    """Yield say(text), which prints a line by `show`; between such lines the heart beats, unless quiet.

    stream: stderr by default. Within another such block it is that one's.
    """
    if quiet:
        yield show
        return
    if _beating:
        yield _beating[-1].say
        return
    heart, over = Heartbeat(show, sys.stderr if stream is None else stream, clock), threading.Event()

    def live() -> None:
        while not over.wait(every):
            heart.beat()

    thread = threading.Thread(target=live, name="heartbeat", daemon=True)
    _beating.append(heart)
    thread.start()
    try:
        yield heart.say
    finally:
        over.set()
        thread.join()
        _beating.pop()
        heart.clear()


@contextmanager
def resting() -> Iterator[None]:
    """Within the block the heart is silent: a bar shows that it goes on."""
    if not _beating:
        yield
        return
    heart = _beating[-1]
    heart.clear()
    heart.resting = True
    try:
        yield
    finally:
        heart.under_way("")
        heart.resting = False


def under_way(text: str | Callable[[], str]) -> None:
    """What goes on from now on, for the heartbeat, where there is one."""
    if _beating:
        _beating[-1].under_way(text)

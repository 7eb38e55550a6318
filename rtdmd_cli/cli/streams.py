"""Standard output and error of a process whose terminal or reader may go away while it works."""

import io
import os
import sys
from typing import Any

STDIN, STDOUT, STDERR = 0, 1, 2


class _Dropping(io.FileIO):
    """A file whose writes never fail: what can't be written is dropped, and so is all that follows."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError:  # the reader left, the terminal is gone, the disk is full
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, self.fileno())
            os.close(sink)
            return memoryview(data).nbytes


def open_streams() -> None:
    """Let no work end because nobody reads stderr any more, and no file take the place of a stream that is closed.

    stdout carries data: that it can't be written is an error like others.
    """
    for descriptor in (STDIN, STDOUT, STDERR):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened would get its number and what is printed
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = _text(io.FileIO(STDOUT, "w", closefd=False), None)
    if sys.stderr is None or sys.stderr is sys.__stderr__:  # not where a test holds it
        encoding = sys.stderr.encoding if sys.stderr else None
        sys.stderr = _text(_Dropping(STDERR, "w", closefd=False), encoding)


def _text(raw: io.FileIO, encoding: str | None) -> io.TextIOWrapper:
    """As Python's own: a line at a time, nothing unprintable raises. encoding: None for the locale's."""
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors="backslashreplace", line_buffering=True)

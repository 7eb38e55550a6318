"""What a user's own code or a library prints goes to stderr, or nowhere: stdout is for the program's results. No torch."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TextIO


@contextmanager
def prints_on_stderr() -> Iterator[None]:
    """Within the block Python's stdout and the process's own, for libraries and child processes, lead to stderr."""
    with _stdout_to(2, sys.stderr):
        yield


@contextmanager
def prints_nowhere() -> Iterator[None]:
    """As `prints_on_stderr`, but what is printed on stdout is dropped, as --quiet wants; stderr keeps its errors."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, _stdout_to(nowhere.fileno(), nowhere):
        yield


@contextmanager
def _stdout_to(descriptor: int, stream: TextIO) -> Iterator[None]:
    _flush()
    kept = None
    with suppress(OSError):  # one of them is closed
        kept = os.dup(1)
        os.dup2(descriptor, 1)
    try:
        with redirect_stdout(stream):
            yield
    finally:
        _flush()
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)


def _flush() -> None:
    if sys.__stdout__ is not None:
        with suppress(OSError, ValueError):  # a reader that left shows when the results are printed
            sys.__stdout__.flush()

"""What a user's own code prints goes to stderr: stdout is for the program's results. No torch."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress


@contextmanager
def prints_on_stderr() -> Iterator[None]:
    """Within the block Python's stdout and the process's own, for libraries and child processes, lead to stderr."""
    _flush()
    kept = None
    with suppress(OSError):  # one of them is closed
        kept = os.dup(1)
        os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
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

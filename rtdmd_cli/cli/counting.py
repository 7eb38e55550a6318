"""Progress of making pictures, on stderr: a bar on a terminal, plain lines otherwise, nothing when quiet."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

LINE_SECONDS = 10.0


@contextmanager
def counting(
    total: int,
    quiet: bool,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
    what: str = "",
) -> Iterator[Callable[[int], None]]:
    """Yield advance(n): n more of `total` pictures are done. stream: stderr by default. what: done to them.

    Without a terminal there is a line every 10 s, and one at the end.
    """
    stream = sys.stderr if stream is None else stream
    name = f"{what}: pictures" if what else "pictures"
    if quiet:
        yield lambda n: None
    elif stream.isatty() and os.environ.get("TERM") != "dumb":
        with _bar(stream, total, name) as advance:
            yield advance
    else:
        yield _lines(stream, total, clock, name)


def _lines(stream: TextIO, total: int, clock: Callable[[], float], name: str) -> Callable[[int], None]:
    from rtdmd_cli.engine.training.clock import duration

    began = printed = clock()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, printed
        done, now = done + n, clock()
        if n == 0 or (now - printed < LINE_SECONDS and done < total):
            return
        printed, left = now, (now - began) / done * (total - done)
        line = f"{name} {done}/{total}  elapsed {duration(now - began)}  left {duration(left)}"
        print(line, file=stream, flush=True)

    return advance


@contextmanager
def _bar(stream: TextIO, total: int, name: str) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    # Standard output stays what it is: it carries data.
    with Progress(console=Console(file=stream), redirect_stdout=False, redirect_stderr=False) as progress:
        task = progress.add_task(name, total=total)

        def advance(n: int) -> None:
            progress.advance(task, n)

        yield advance

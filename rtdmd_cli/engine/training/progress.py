"""Progress of a training on stderr: a live bar on a terminal, plain lines otherwise, nothing when quiet."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO, TypeAlias

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column

LINE_SECONDS = 10.0
Update: TypeAlias = Callable[[int, Mapping[str, float]], None]


@contextmanager
def training_progress(
    total: int,
    start: int,
    quiet: bool,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Update]:
    """Yield update(iteration, metrics): iteration counts the finished ones, from start + 1 to total.

    metrics are shown as they are, in their order. stream: stderr by default. Without a terminal there is a
    line after the first iteration, then one every 10 s, and one after the last.
    """
    stream = sys.stderr if stream is None else stream
    if quiet:
        yield lambda iteration, metrics: None
    elif stream.isatty() and os.environ.get("TERM") != "dumb":
        with _bar(Console(file=stream, highlight=False), total, start, clock) as update:
            yield update
    else:
        yield _lines(stream, total, start, clock)


def _losses(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def duration(seconds: float) -> str:
    """Whole seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _pace(iteration: int, start: int, total: int, seconds: float) -> tuple[float, float]:
    """Iterations a second since `start`, and the seconds left at that speed."""
    speed = (iteration - start) / max(seconds, 1e-6)
    return speed, (total - iteration) / max(speed, 1e-6)


def _lines(stream: TextIO, total: int, start: int, clock: Callable[[], float]) -> Update:
    began = clock()
    printed: float | None = None

    def update(iteration: int, metrics: Mapping[str, float]) -> None:
        nonlocal printed
        now = clock()
        if printed is not None and now - printed < LINE_SECONDS and iteration != total:
            return
        printed = now
        speed, left = _pace(iteration, start, total, now - began)
        parts = [
            f"iteration {iteration}/{total}",
            f"elapsed {duration(now - began)}",
            f"left {duration(left)}",
            f"{speed:.2f} it/s",
            _losses(metrics),
        ]
        print("  ".join(part for part in parts if part), file=stream, flush=True)

    return update


@contextmanager
def _bar(console: Console, total: int, start: int, clock: Callable[[], float]) -> Iterator[Update]:
    columns = (
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        BarColumn(bar_width=16),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[pace]}", style="cyan"),
        TextColumn("{task.fields[losses]}", table_column=Column()),  # the one that wraps where it is narrow
    )
    began = clock()
    # Standard output stays what it is: it carries data.
    with Progress(*columns, console=console, redirect_stdout=False, refresh_per_second=4) as progress:
        task = progress.add_task("", total=total, completed=start, pace="", losses="")

        def update(iteration: int, metrics: Mapping[str, float]) -> None:
            speed, left = _pace(iteration, start, total, clock() - began)
            pace = f"left {duration(left)}  {speed:.2f} it/s"
            progress.update(task, completed=iteration, pace=pace, losses=_losses(metrics))

        yield update

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

from rtdmd_cli.engine.training.clock import duration
from rtdmd_cli.engine.training.heartbeat import COLUMNS, resting, under_way

LINE_SECONDS = 10.0
SHOWN = 2
TELLING = (
    *("previews/strict_score", "previews/clip_score", "watch/held_out", "measured/", "reward/"),
    *("dmd_loss", "hinge_loss", "fake_loss"),
)
"""Names of figures, or their beginnings, in the order in which they tell how a run goes."""
SETTLED_ITERATIONS, SETTLED_SECONDS = 10, 60.0
"""After so many iterations, or so long, the first estimate of the whole time is told."""
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

    Of the metrics the two most telling ones are shown, and "memory_gib" if it is there. stream: stderr by default.
    Without a terminal there is a line after the first iteration, then one every 10 s, and one after the last; of at most
    80 columns. After 10 iterations or a minute it is told once how long the rest will take on this machine.
    """
    stream = sys.stderr if stream is None else stream
    if quiet:
        yield lambda iteration, metrics: None
    elif stream.isatty() and os.environ.get("TERM") != "dumb":
        with resting(), _bar(Console(file=stream, highlight=False), total, start, clock) as update:
            yield update
    else:
        yield _lines(stream, total, start, clock)


def telling(metrics: Mapping[str, float]) -> list[str]:
    """The most telling figures as short texts, and the memory that is held."""
    first = [name for start in TELLING for name in metrics if name.startswith(start)]
    chosen = list(dict.fromkeys([*first, *(name for name in metrics if name != "memory_gib")]))[:SHOWN]
    texts = [f"{name.rpartition('/')[2][:28]} {metrics[name]:.3g}" for name in chosen]
    return [*texts, f"{metrics['memory_gib']:.1f} GiB"] if "memory_gib" in metrics else texts


def speed_text(speed: float) -> str:
    """Iterations a second, or seconds an iteration where that reads better."""
    return f"{speed:.2f} it/s" if speed >= 0.5 else f"{1 / max(speed, 1e-9):.1f} s/it"


def fitted(parts: list[str]) -> str:
    """The parts in a line of at most 80 columns: what does not fit at the end is left out."""
    while len(line := "  ".join(parts)) > COLUMNS and len(parts) > 1:
        parts = parts[:-1]
    return line[:COLUMNS]


def _pace(iteration: int, start: int, total: int, seconds: float) -> tuple[float, float]:
    """Iterations a second since `start`, and the seconds left at that speed."""
    speed = (iteration - start) / max(seconds, 1e-6)
    return speed, (total - iteration) / max(speed, 1e-6)


def _estimate(start: int, total: int, clock: Callable[[], float]) -> Callable[[int], str]:
    """Gives, once, what is left at the speed of the first iterations; "" before and after, and at the end."""
    began, told = clock(), False

    def estimate(iteration: int) -> str:
        nonlocal told
        done, seconds = iteration - start, clock() - began
        if told or iteration == total or not (done >= SETTLED_ITERATIONS or seconds >= SETTLED_SECONDS):
            return ""
        told = True
        speed, left = _pace(iteration, start, total, seconds)
        return f"about {duration(left)} more on this machine, at {1 / speed:.2g} s an iteration"

    return estimate


def _number(iteration: int, total: int) -> str:
    return f"iteration {iteration}/{total}"


def _lines(stream: TextIO, total: int, start: int, clock: Callable[[], float]) -> Update:
    under_way(_number(start + 1, total))
    began, estimate = clock(), _estimate(start, total, clock)
    printed: float | None = None

    def update(iteration: int, metrics: Mapping[str, float]) -> None:
        nonlocal printed
        now = clock()
        under_way(_number(iteration + 1, total))
        if told := estimate(iteration):
            print(told, file=stream, flush=True)
        if printed is not None and now - printed < LINE_SECONDS and iteration != total:
            return
        printed = now
        speed, left = _pace(iteration, start, total, now - began)
        parts = [_number(iteration, total), f"left {duration(left)}", speed_text(speed)]
        print(fitted([*parts, *telling(metrics)]), file=stream, flush=True)

    return update


@contextmanager
def _bar(console: Console, total: int, start: int, clock: Callable[[], float]) -> Iterator[Update]:
    columns = (
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        BarColumn(bar_width=8),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[pace]}", style="cyan"),
        TextColumn("{task.fields[losses]}", table_column=Column()),  # the one that wraps where it is narrow
    )
    began, estimate = clock(), _estimate(start, total, clock)
    # Standard output stays what it is: it carries data.
    with Progress(*columns, console=console, redirect_stdout=False, refresh_per_second=4) as progress:
        task = progress.add_task("", total=total, completed=start, pace="", losses="")

        def update(iteration: int, metrics: Mapping[str, float]) -> None:
            if told := estimate(iteration):
                progress.console.print(told)
            speed, left = _pace(iteration, start, total, clock() - began)
            pace = f"left {duration(left)}  {speed_text(speed)}"
            progress.update(task, completed=iteration, pace=pace, losses="  ".join(telling(metrics)))

        yield update

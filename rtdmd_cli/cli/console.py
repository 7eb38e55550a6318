"""What a command prints: its result on stdout, all else on stderr."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from rtdmd_cli.cli.quiet import quiet_libraries

__all__ = ["printable", "quiet_libraries", "say", "show", "working"]

LOADING = "loading torch and the model libraries"
"""What takes the first seconds of many a command."""


def say(text: str, quiet: bool = False) -> None:
    """A line on stderr, unless quiet."""
    if not quiet:
        typer.echo(printable(text), err=True)


@contextmanager
def working(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Around work that takes long: yield say(text), as `say`; in between it is shown that the work goes on.

    Nothing else may be printed within the block, but for bars that rest the heartbeat.
    """
    from rtdmd_cli.engine.training.heartbeat import heartbeat

    with heartbeat(lambda text: say(text, quiet), quiet) as tell:
        yield lambda text: tell(printable(text))


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """The result on stdout: one JSON object (ASCII, no NaN or infinity), or a line `key  value` for each, "-" for None."""
    if as_json:
        typer.echo(json.dumps(plain(result), indent=2, allow_nan=False))
        return
    width = max((len(key) for key in result), default=0)
    for key, value in result.items():
        typer.echo(printable(f"{key:<{width}}  {'-' if value is None else value}"))


def printable(text: str) -> str:
    """The text with control characters but line ends and tabs escaped: what files hold must not steer a terminal."""
    return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)


def cell(text: str) -> str:
    """As `printable`, with line ends and tabs escaped too: a cell of a table is one line."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def plain(value: Any) -> Any:
    """The value in JSON's types: paths as text, numbers that are not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

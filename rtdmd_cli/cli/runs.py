"""`rtdmd runs`: list what has been trained, look at one run or at all, put two side by side."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdmd_cli.cli import completing, console
from rtdmd_cli.cli.starting import Out, going_on
from rtdmd_cli.config.places import shown_from
from rtdmd_cli.errors import BusyError, EnvironmentFailure

if TYPE_CHECKING:
    from rtdmd_cli.engine.storage.runs import RunSummary

PORT = 8778
KILLED = "killed"  # a state of `storage.runs`
WIDE = 120  # columns, from which on the table has figures and preset
STAGES = {"distill": "1", "tune-reward": "2"}
SHOWN_FIGURES = 3  # of a run, in the table for people
FIRST_FIGURES = ("previews/", "measured/", "reward/", "lag", "dmd_loss", "fake_loss")
"""Beginnings of the names that come first in the table."""
app = typer.Typer(
    name="runs",
    help="List the runs, show one, view all in the browser, compare two on one page.",
    no_args_is_help=True,
)

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME|PATH", help="A run's name under --out, or its folder.", autocompletion=completing.runs
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")]


@app.command("list")
def list_(out: Out = Path("runs"), as_json: Json = False, quiet: Quiet = False) -> None:
    """List the runs, the one that changed last first: stage, state, length, last figures, preset, date."""
    from rtdmd_cli.engine.storage.runs import list_runs

    found = list_runs(out)
    if as_json:
        typer.echo(json.dumps([console.plain(row(each)) for each in found], indent=2, allow_nan=False))
        return
    if not found:
        console.say(f"There are no runs under {out}/. Make one: rtdmd distill", quiet)
        return
    _print_table(found, quiet)
    for each in found:
        if each.problem:
            console.say(f"{each.run.path} is damaged: {each.problem}", quiet)
    if any(each.state == KILLED for each in found):
        console.say(
            "killed: no process works on it any more; the command that goes on: rtdmd runs show NAME", quiet
        )


def row(each: RunSummary) -> dict[str, Any]:
    """A run as JSON."""
    return {
        "name": each.name,
        "path": each.run.path,
        "stage": each.stage,
        "state": each.state,
        "problem": each.problem or None,
        "iterations": each.iterations,
        "target": each.target,
        "seconds": round(each.seconds, 1),
        "figures": dict(each.figures),
        "preset": each.preset.name if each.preset else None,
        "model": shown_from(each.run.path, each.preset.model.path) if each.preset else None,
        "date": each.date.isoformat(timespec="seconds"),
    }


def _print_table(found: list[RunSummary], quiet: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from rtdmd_cli.cli.rewards import PIPED_WIDTH
    from rtdmd_cli.engine.training.clock import duration

    screen = Console(highlight=False, markup=False)
    if not screen.is_terminal:
        screen.width = PIPED_WIDTH
    wide = screen.width >= WIDE
    more = ("last figures", "preset") if wide else ()
    table = Table("run", "stage", "state", "done", "time", "left", *more, "changed", box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:6]:
        column.no_wrap = True
    for each in found:
        done = f"{each.iterations}/{each.target}" if each.target else f"{each.iterations}"
        left = "" if each.seconds_left is None else duration(each.seconds_left)
        preset = each.preset.name if each.preset else ""
        rest = (
            (figures(each), preset, f"{each.date:%Y-%m-%d %H:%M}") if wide else (f"{each.date:%m-%d %H:%M}",)
        )
        stage, time = STAGES.get(each.stage or "", ""), duration(each.seconds)
        table.add_row(*map(console.cell, (each.name, stage, each.state, done, time, left, *rest)))
    screen.print(table)
    console.say("Times are in UTC, lengths in iterations (stage 1) or epochs (stage 2).", quiet)


def figures(each: RunSummary) -> str:
    """The most telling of a run's last figures."""
    first = [name for start in FIRST_FIGURES for name in each.figures if name.startswith(start)]
    names = list(dict.fromkeys([*first, *each.figures]))[:SHOWN_FIGURES]
    return "  ".join(f"{name} {each.figures[name]:.4g}" for name in names)


@app.command()
def show(name: Name, out: Out = Path("runs"), as_json: Json = False, quiet: Quiet = False) -> None:
    """Show one run: what it is, how far it came, its checkpoints, its last figures, its command."""
    from rtdmd_cli.engine.report.run_facts import grid_steps
    from rtdmd_cli.engine.storage.runs import find_run, recorded, saved, summary

    run = find_run(name, out)
    each, kept, environment = summary(run), saved(run), recorded(run)
    if end_report(each):
        console.say(f"{run.report} still showed a run in progress: now it says how it ended", quiet)
    details = row(each) | {
        "checkpoints": list(kept.steps),
        "newest_checkpoint": kept.newest,
        "damaged_checkpoints": dict(kept.skipped),
        "grids": len(grid_steps(run)),
        "report": run.report if run.report.is_file() else None,
        "command": environment.get("command"),
        "rtdmd": environment.get("rtdmd"),
        "device": environment.get("device"),
    }
    console.show(details if as_json else readable(details), as_json)
    if each.state in (KILLED, "interrupted", "failed"):
        console.say(f"Go on with: {going_on(each.run, each.stage)}", quiet)


def end_report(each: RunSummary) -> bool:
    """Have report.html say how the run ended where it still is that of a run that goes on; whether it was.

    A process that is killed leaves such a page. One that can't be written, or whose run is taken up just now, stays.
    """
    from rtdmd_cli.engine.report.html import STATUS_WORDS, ended_page
    from rtdmd_cli.engine.storage.files import write_text

    words = {**STATUS_WORDS, KILLED: "The run was killed"}
    if each.state not in words or each.state == "running" or not each.run.report.is_file():
        return False
    try:
        with each.run.lock():
            before = each.run.report.read_text("utf-8")
            after = ended_page(before, words[each.state])
            if after != before:
                write_text(each.run.report, after)
    except (BusyError, EnvironmentFailure, OSError, UnicodeDecodeError):  # to be looked at, not to be mended
        return False
    return after != before


def readable(details: dict[str, Any]) -> dict[str, Any]:
    """For people: lists in one line, a line for each figure, nothing where there is nothing."""
    figures, damaged = details["figures"], details["damaged_checkpoints"]
    steps, command = details["checkpoints"], details["command"]
    shown = details | {
        "checkpoints": ", ".join(str(step) for step in steps),
        "command": shlex.join(str(part) for part in command) if isinstance(command, list) else None,
        "damaged_checkpoints": "; ".join(damaged.values()),
    }
    del shown["figures"]
    from rtdmd_cli.engine.report.metrics import explained

    shown = {key: value for key, value in shown.items() if value not in (None, "")}
    width = max((len(key) for key in figures), default=0)
    lines = [f"  {key:<{width}}  {value:<12.6g}{explained(key)}".rstrip() for key, value in figures.items()]
    return shown | {"figures": "\n".join(["", *lines])} if lines else shown


@app.command()
def view(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN ...", help="Runs, names or folders. Default: all of them."),
    ] = None,
    out: Out = Path("runs"),
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on this machine; 0 for a free one.")
    ] = PORT,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Open a local page over the runs: curves, and pictures by prompt and checkpoint. Ctrl-C ends it.

    It is served to this machine alone and loads nothing from elsewhere.
    """
    from rtdmd_cli.engine.report.viewer_server import Viewer
    from rtdmd_cli.engine.storage.runs import find_run, list_runs, summary

    chosen = [find_run(name, out) for name in names or []]
    with Viewer(port, lambda: [summary(run) for run in chosen] if chosen else list_runs(out)) as viewer:
        if as_json:
            typer.echo(json.dumps({"url": viewer.url}))
        else:
            typer.echo(viewer.url)
        console.say("Open that address in a browser of this machine; Ctrl-C ends it.", quiet)
        with suppress(KeyboardInterrupt):  # how it is meant to end
            viewer.serve_forever()


@app.command()
def compare(
    left: Annotated[
        str, typer.Argument(metavar="A", help="A run: its name or folder.", autocompletion=completing.runs)
    ],
    right: Annotated[str, typer.Argument(metavar="B", help="Another one.", autocompletion=completing.runs)],
    out: Annotated[Path, typer.Option("--runs", help="Folder that holds the runs.")] = Path("runs"),
    file: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The page. Default: compare-A-B.html with the runs."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the page if there is one.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page with the curves and sample grids of two runs side by side."""
    from rtdmd_cli.engine.report.run_compare import compare_runs
    from rtdmd_cli.engine.storage.runs import find_run

    one, other = find_run(left, out), find_run(right, out)
    names = "-".join(each.path.resolve().name for each in (one, other))
    beside = one.path if one.path.name not in ("", "..") else one.path.resolve()
    path = file if file is not None else beside.parent / f"compare-{names}.html"
    compare_runs(one, other, path, force)
    if as_json:
        typer.echo(json.dumps({"page": str(path)}))
    else:
        typer.echo(str(path))
    console.say("Open it in a browser; it is one file that needs nothing else.", quiet)

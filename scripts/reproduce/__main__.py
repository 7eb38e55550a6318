"""The whole table of the built-in world, cell by cell; see `scripts/reproduce_shapes --help`."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from rtdmd_cli.cli.quiet import quiet_libraries
from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.engine.storage.files import write_text
from rtdmd_cli.errors import RtdmdError
from scripts.reproduce import figure, samples, table
from scripts.reproduce.matrix import Cell, Request, Row, chosen_rows, table_cells, table_rows
from scripts.reproduce.runner import ROOT, Runner, Stopped, stop_on_signals

FAST, FULL = "shapes-4step", "shapes-4step-full"
SEEDS = 3
FOUR = "evaluate.images_per_prompt=4"
OWN = {FAST: (FOUR, "distill.iterations=280"), FULL: (FOUR,)}
"""What the table has of its own by its preset, unless --set says otherwise: the interval of one picture a prompt is 0.04
wide, and it has no diversity; the cells so far were trained when `shapes-4step` had 280 iterations. See also
`matrix.STAGE_1_OWN`."""
OUT = ROOT / "work/reproduce"

app = typer.Typer(add_completion=False)


@dataclass
class Session:
    """What a call has found and made. failures: by the key of a cell. exit_code: of the first one. stopped: by a signal."""

    runner: Runner
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    exit_code: int = 0
    stopped: bool = False


@app.command()
def main(
    full: Annotated[
        bool, typer.Option("--full/--fast", help=f"Preset {FULL}, every row with every seed; or {FAST}.")
    ] = False,
    seeds: Annotated[
        int, typer.Option(min=1, help="Seeds of a row. With --fast, ablations have one.")
    ] = SEEDS,
    only: Annotated[str, typer.Option(metavar="ROW[,ROW]", help="Make these rows only; see --list.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of runs, table.md, table.svg and samples.png.")] = OUT,
    cells_at: Annotated[
        Path | None,
        typer.Option(
            "--cells",
            metavar="DIR",
            help="Folder of the cells' figures. Default: OUT/cells; those made so far: scripts/reproduce/cells.",
        ),
    ] = None,
    list_rows: Annotated[
        bool, typer.Option("--list", help="List the rows and what is done; run none.")
    ] = False,
    minutes: Annotated[float | None, typer.Option(min=0, help="Start no cell after so many minutes.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Benchmark prompts of an evaluation; the table says so.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a preset value everywhere."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
) -> None:
    """Make the table of the built-in world: teacher, both stages, ablations, each with its spread over seeds.

    A finished cell is kept and not run again; a training that was broken off goes on. Seed 0 is the preset's own.
    """
    quiet_libraries()
    try:
        name = FULL if full else FAST
        request = Request(name, (*OWN[name], *(overrides or ())), limit)
        preset = load_preset(request.preset, request.overrides).preset
        rows = table_rows(preset)
        chosen = chosen_rows(rows, [name for name in only.split(",") if name])
        cells = table_cells(request, rows, seeds, seeds if full else 1)
        if cells_at is not None and not cells_at.exists():
            _say(f"there is no folder {cells_at.resolve()} yet: every cell counts as not run")
        session = Session(Runner(out.resolve(), (cells_at or out / "cells").resolve(), _say))
        _read(session, cells)
        if not list_rows:
            _work(session, [cell for cell in cells if cell.row.name in chosen], minutes)
        command = _command(full, seeds, out, cells_at, request)
        _show(session, rows, cells, request, out.resolve(), command, list_rows, as_json)
    except RtdmdError as error:
        _say(f"error: {error.message}\nhint: {error.hint}")
        raise typer.Exit(error.exit_code) from error
    if session.exit_code:
        raise typer.Exit(session.exit_code)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _read(session: Session, cells: Sequence[Cell]) -> None:
    """Take over what is stored of every cell."""
    for cell in cells:
        record = session.runner.stored(cell)
        if record is not None:
            session.records[cell.key] = record


def _work(session: Session, cells: Sequence[Cell], minutes: float | None) -> None:
    """Make the cells that are not there. A failed one does not keep the others; a signal ends the work."""
    began = time.monotonic()
    with stop_on_signals():
        try:
            for cell in cells:
                if cell.key in session.records or cell.key in session.failures:
                    continue
                if minutes is not None and time.monotonic() - began >= 60 * minutes:
                    _say(f"{minutes:g} minutes are over: no further cell is started")
                    return
                _make(session, cell)
        except Stopped as stop:
            _say("stopped; the same command goes on from here")
            session.exit_code, session.stopped = stop.exit_code, True


def _make(session: Session, cell: Cell) -> None:
    try:
        session.records[cell.key] = session.runner.make(cell)
        if cell.stage_1 is not None:
            _read(session, [cell.stage_1])
    except RtdmdError as error:
        _say(f"{cell.label} failed: {error.message}")
        session.failures[cell.key] = f"failed, exit code {error.exit_code}"
        session.exit_code = session.exit_code or error.exit_code


def _command(full: bool, seeds: int, out: Path, cells_at: Path | None, request: Request) -> str:
    """The command that goes on with this table, without its --only."""
    words = ["scripts/reproduce_shapes", "--full" if full else "--fast"]
    words += ["--seeds", str(seeds)] if seeds != SEEDS else []
    words += ["--out", str(out)] if out != OUT else []
    words += ["--cells", str(cells_at)] if cells_at is not None else []
    words += ["--limit", str(request.limit)] if request.limit is not None else []
    own = OWN[request.preset]
    words += [word for text in request.overrides if text not in own for word in ("--set", text)]
    return shlex.join(words)


def _show(
    session: Session,
    rows: Sequence[Row],
    cells: Sequence[Cell],
    request: Request,
    out: Path,
    command: str,
    list_rows: bool,
    as_json: bool,
) -> None:
    """Print the table or the list; write table.md, table.svg and samples.png unless only a list was asked for."""
    _read(session, cells)  # another call may have filled some in the meantime
    lines = table.table_lines(rows, cells, session.records, session.failures)
    note = table.missing_note(lines, command)
    result: dict[str, Any] = {
        "preset": request.preset,
        "limit": request.limit,
        "rows": [line.record() for line in lines],
        "missing": table.missing(lines),
        "note": note,
    }
    if list_rows:
        text = "\n".join(f"{line.row.name:<20} {line.done} of {line.planned}  {line.label}" for line in lines)
        print(json.dumps(result, indent=2) if as_json else f"{text}\n\n{note}")
        return
    conditions = table.conditions(request.preset, request.limit, list(session.records.values()))
    text = table.markdown(lines, [*conditions, "", note])
    write_text(out / "table.md", text)
    write_text(out / "table.svg", figure.score_chart(lines))
    result["files"] = [str(out / "table.md"), str(out / "table.svg")]
    result["files"] += [str(path) for path in _draw(session, cells, out / "samples.png")]
    print(json.dumps(result, indent=2) if as_json else text, end="\n" if as_json else "")


def _draw(session: Session, cells: Sequence[Cell], path: Path) -> list[Path]:
    """The picture of this table's models, drawn if it isn't there; none where they can't be drawn, which is said."""
    shown = samples.shown_cells(session.runner, cells, session.records)
    if not shown or session.stopped:
        return []
    try:
        with stop_on_signals():
            if not samples.shows(path, shown):
                samples.save_samples(session.runner, shown, session.records, path)
    except RtdmdError as error:
        _say(f"no pictures: {error.message}")
        session.exit_code = session.exit_code or error.exit_code
        return []
    except Stopped as stop:
        session.exit_code = stop.exit_code
        return []
    return [path]


if __name__ == "__main__":
    app()

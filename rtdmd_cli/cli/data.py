"""`rtdmd data`: the public sets of prompts, for training and for benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdmd_cli.cli import completing, console
from rtdmd_cli.errors import DataError

if TYPE_CHECKING:
    from rtdmd_cli.engine.prompts.public_sets import DataSet

app = typer.Typer(
    name="data",
    help="List and fetch the public sets of prompts.",
    no_args_is_help=True,
)

Name = Annotated[
    str,
    typer.Argument(metavar="NAME", help="A name of `rtdmd data list`.", autocompletion=completing.data_sets),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")]


@app.command("list")
def list_(as_json: Json = False, quiet: Quiet = False) -> None:
    """List the sets: what they are, how many prompts, licence, source, and whether they are here."""
    from rtdmd_cli.engine.prompts.public_sets import DATA

    rows = [row(each) for each in DATA.values()]
    if as_json:
        typer.echo(json.dumps([console.plain(each) for each in rows], indent=2))
        return
    _print(rows)
    console.say("Fetch one: rtdmd data fetch NAME. Use it: --set distill.prompts=data:NAME", quiet)


def row(data: DataSet) -> dict[str, Any]:
    """A set as JSON. here: "yes", "yes, your own file", "no", "damaged", or "made on demand"."""
    from rtdmd_cli.engine.prompts.store import stored

    try:
        found = stored(data)
        here = "no" if data.url else "made on demand"
        if found:
            here = "yes, your own file" if found.own else "yes"
    except DataError:
        found, here = None, "damaged"
    return {
        "name": data.name,
        "use": data.use,
        "what": data.what,
        "prompts": data.prompts,
        "size": data.size,
        "licence": data.licence,
        "source": data.source,
        "url": data.url or None,
        "sha256": data.sha256,
        "here": here,
        "path": found.path if found else None,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from rtdmd_cli.cli.rewards import PIPED_WIDTH

    table = Table("set", "use", "what", "prompts", "licence", "source", "here")
    table.columns[0].no_wrap = True
    for each in rows:
        count = "" if each["prompts"] is None else f"{each['prompts']:,}"
        table.add_row(
            each["name"], each["use"], each["what"], count, each["licence"], each["source"], each["here"]
        )
    screen = Console(highlight=False, markup=False)
    if not screen.is_terminal:
        screen.width = PIPED_WIDTH
    screen.print(table)


@app.command()
def fetch(
    name: Name,
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="FILE", help="Take this file, after checking it; no network."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Bring it anew although it is here.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Bring a set into the cache, checked by its sha256, and name its licence and source."""
    from rtdmd_cli.engine.prompts import store
    from rtdmd_cli.engine.prompts.public_sets import find_data
    from rtdmd_cli.engine.prompts.reading import read_stored

    data = find_data(name)
    found = store.fetch(data, read_stored, file, force)
    count = len(read_stored(found))
    say = "fetched" if found.fresh else "already here"
    console.say(f"{data.name}: {say}, {count:,} prompts; licence: {data.licence}", quiet)
    if found.own:
        console.say(
            "Nothing shows that this file is the published set: it is kept as your own, and marked so.",
            quiet,
        )
    elif not found.pinned:
        console.say(f"its sha256 is not pinned yet; this one is recorded: {found.sha256}", quiet)
    result = {
        "name": data.name,
        "path": found.path,
        "fetched": found.fresh,
        "prompts": count,
        "size": found.path.stat().st_size,
        "sha256": found.sha256,
        "pinned": found.pinned,
        "own": found.own,
        "licence": data.licence,
        "source": data.source,
    }
    console.show(result if as_json else {k: _readable(v) for k, v in result.items()}, as_json)


def _readable(value: Any) -> Any:
    return ("yes" if value else "no") if isinstance(value, bool) else value


@app.command()
def path(name: Name, as_json: Json = False, quiet: Quiet = False) -> None:
    """Print where a set lies on this machine; exit code 3 if it isn't here."""
    from rtdmd_cli.engine.prompts import store
    from rtdmd_cli.engine.prompts.public_sets import find_data

    found = store.require(find_data(name))
    typer.echo(json.dumps({"path": str(found.path)}) if as_json else str(found.path))

"""`rtdmd fetch`: weights beforehand."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdmd_cli.cli import completing, console

if TYPE_CHECKING:
    from rtdmd_cli.engine.rewards.fetch import Fetched


def fetch(
    name: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|REWARD",
            help="A preset (its base model), a hub id, or a reward's name.",
            autocompletion=completing.weights,
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON value.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")] = False,
) -> None:
    """Download the weights of a model or a reward beforehand, naming size and licence.

    Example: rtdmd fetch sd3-4step
    """
    from rtdmd_cli.engine.rewards.fetch import find_wanted
    from rtdmd_cli.engine.rewards.local import readable
    from rtdmd_cli.engine.rewards.needed import size_of
    from rtdmd_cli.engine.training.downloading import download

    console.quiet_libraries(quiet)
    results = []
    with console.working(quiet) as say:
        for wanted in find_wanted(name):
            expected = size_of(wanted)
            about = "" if expected is None else f", {'' if wanted.need else 'about '}{readable(expected)}"
            say(f"{wanted.source or name}{about}; licence: {wanted.licence}")
            found = download(wanted)
            if found.fresh:
                say(f"downloaded {readable(found.size)} to {found.path}")
            else:
                say("built in" if found.path is None else f"already here: {found.path}")
            results.append(row(found))
    if not results:
        console.say(f"{name} is built in and needs no weights", quiet)
    if as_json:
        typer.echo(json.dumps([console.plain(each) for each in results], indent=2))
        return
    for each in results:
        size = readable(each["size"])
        typer.echo(f"{each['source'] or 'built in'}  {each['path'] or '-'}  {size}  {each['licence']}")


def row(found: "Fetched") -> dict[str, Any]:
    """As JSON."""
    return {
        "kind": found.wanted.kind,
        "source": found.wanted.source,
        "revision": found.wanted.revision,
        "path": found.path,
        "size": found.size,
        "licence": found.wanted.licence,
        "downloaded": found.fresh,
    }

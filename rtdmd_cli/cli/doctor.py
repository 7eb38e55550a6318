"""`rtdmd doctor`: what this machine can do, and what is wrong with it."""

import json
import sys
from typing import Annotated

import typer

from rtdmd_cli.cli import console
from rtdmd_cli.errors import EnvironmentFailure

INDENT = " " * 6


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")] = False,
) -> None:
    """Check this machine: Python, libraries, GPU, memory, disk, hub; PASS, WARN or FAIL, and how to fix it.

    Put its output into a bug report: it names no user, host or token. The exit code is 3 if something needed fails.

    Example: rtdmd doctor
    """
    from rtdmd_cli.engine.doctor.run import examine

    found = []
    for check in examine():
        found.append(check)
        if not as_json:
            typer.echo(f"{check.state}  {check.name:<12}  {check.found}")
            if check.fix:
                typer.echo(f"{INDENT}{'':<12}  -> {check.fix}")
            sys.stdout.flush()  # some take seconds
    failed = [check.name for check in found if check.state == "FAIL"]
    warned = [check.name for check in found if check.state == "WARN"]
    if as_json:
        rows = [
            {
                "name": each.name,
                "state": each.state,
                "found": each.found,
                "fix": each.fix,
                "facts": each.facts,
            }
            for each in found
        ]
        shown = {"checks": rows, "failed": failed, "warned": warned}
        typer.echo(json.dumps(console.plain(shown), indent=2, allow_nan=False))
    if failed:
        console.say(f"fails: {', '.join(failed)}", quiet)
        raise typer.Exit(EnvironmentFailure.exit_code)
    console.say("This machine is ready." + (f" To look at: {', '.join(warned)}" if warned else ""), quiet)

"""`rtdmd rewards`: what there is to be raised, and whether it works. Data on stdout, everything else on stderr."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdmd_cli.cli import completing, console
from rtdmd_cli.errors import DataError, EnvironmentFailure, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from rtdmd_cli.engine.evaluation.reward_check import CheckResult
    from rtdmd_cli.engine.rewards.base import Need, RewardEntry

PIPED_WIDTH = 160  # columns, where no terminal says how wide it is
app = typer.Typer(
    name="rewards",
    help="List the rewards, and check that they work: order, range, gradient.",
    no_args_is_help=True,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")]


@app.command("list")
def list_(as_json: Json = False, quiet: Quiet = False) -> None:
    """List the rewards: what each measures, its usual range, and the weights it needs."""
    from rtdmd_cli.engine.rewards.registry import REWARDS

    if as_json:
        typer.echo(json.dumps([console.plain(_row(entry)) for entry in REWARDS.values()], indent=2))
        return
    _print(_list_table(list(REWARDS.values())))
    console.say("A reward of your own is named module:Class; try it: rtdmd rewards check module:Class", quiet)


def _row(entry: RewardEntry) -> dict[str, Any]:
    from rtdmd_cli.engine.rewards.local import missing

    absent = missing(entry)
    return {
        "name": entry.name,
        "measures": entry.measures,
        "range": [entry.low, entry.high],
        "differentiable": entry.differentiable,
        "divisor": entry.divisor,
        "metadata": entry.metadata,
        "extra": entry.extra,
        "needs": [dataclasses.asdict(need) | {"here": _here(entry, need)} for need in entry.needs],
        "available": not absent,
        "missing": [each.what for each in absent],
        "get": [each.get for each in absent],
    }


def _here(entry: RewardEntry, need: Need) -> bool:
    from rtdmd_cli.engine.rewards.local import at_hand, extra_installed

    if entry.extra and not need.source:
        return extra_installed(entry.extra)
    return at_hand(need)


def _list_table(entries: list[RewardEntry]) -> Table:
    from rich.table import Table

    table = Table("reward", "measures", "usual range", "gradient", "weights, size, licence", "here")
    table.columns[0].no_wrap = table.columns[2].no_wrap = True
    for entry in entries:
        weights = [_weights(entry, need) for need in entry.needs] or ["built in"]
        here = [_place(entry, need) for need in entry.needs] or ["built in"]
        table.add_row(
            entry.name,
            entry.measures,
            f"{entry.low:g} to {entry.high:g}",
            "yes" if entry.differentiable else "no",
            "\n".join(weights),
            here[0] if len(set(here)) == 1 else "in part",
        )
    return table


def _weights(entry: RewardEntry, need: Need) -> str:
    from rtdmd_cli.engine.rewards.local import readable

    source = need.source or (f"rtdmd[{entry.extra}]" if entry.extra else "built in")
    return f"{source}, {readable(need.size)}, {need.licence}"


def _place(entry: RewardEntry, need: Need) -> str:
    if not _here(entry, need):
        return "no"
    if need.source:
        return "cached"
    return "installed" if entry.extra else "built in"


@app.command()
def check(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME ...]",
            help="Rewards of the list, or module:Class. Default: all that are here.",
            autocompletion=completing.rewards,
        ),
    ] = None,
    path: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|HUB-ID", help="Load the one named reward from there, not from its usual sources."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    reward_seconds: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Longest time for one picture, 0 for any. Default: 600, and 60 for module:Class.",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Try rewards on drawn pictures whose order is known; nothing is downloaded.

    Exit code 4 if one fails, 3 if one that was named is not here.
    """
    if path is not None and len(names or []) != 1:
        raise UsageError(
            "`--path` is for a single reward.", "Name it: rtdmd rewards check NAME --path FOLDER"
        )
    from rtdmd_cli.engine.rewards.registry import REWARDS, find_reward

    entries = [find_reward(name) for name in dict.fromkeys(names or REWARDS)]
    from rtdmd_cli.engine.compute.importing import quick_imports

    with quick_imports():
        from rtdmd_cli.engine.compute.device import resolve_device
        from rtdmd_cli.engine.evaluation.reward_check import check_rewards

    where = resolve_device(device)
    results = list(
        check_rewards(
            entries,
            where,
            path,
            lambda name: console.say(f"checking {name} on {where.type}", quiet),
            reward_seconds,
        )
    )
    if as_json:
        typer.echo(json.dumps([console.plain(dataclasses.asdict(each)) for each in results], indent=2))
    if not (as_json and quiet):
        _print(_check_table(results), err=as_json)
    _judge(results, named=bool(names))


def _check_table(results: list[CheckResult]) -> Table:
    from rich.table import Table

    table = Table("reward", "result", "pairs in order", "scores", "gradient", "seconds", "reason")
    table.columns[0].no_wrap = True
    for each in results:
        order = "" if each.ordered is None else f"{each.ordered} of {each.pairs}"
        scores = "" if each.low is None else f"{each.low:.4g} to {each.high:.4g}"
        gradient = "" if each.gradient is None else f"{each.gradient:.2g}"
        seconds = "" if each.status == "not available" else f"{each.seconds:.1f}"
        reason = console.printable(each.reason)
        table.add_row(each.name, each.status, order, scores, gradient, seconds, reason)
    return table


def _judge(results: list[CheckResult], named: bool) -> None:
    """DataError if a reward failed, EnvironmentFailure if one that was named is not available."""
    failed = [each for each in results if each.status == "failed"]
    if failed:
        which = ", ".join(f"`{each.name}`" for each in failed)
        raise DataError(
            f"{len(failed)} of {len(results)} rewards failed: {which}: {failed[0].reason}.",
            "Don't train with a reward that fails; its weights may be damaged or another version.",
        )
    absent = [each for each in results if each.status == "not available"]
    if named and absent:
        raise EnvironmentFailure(f"`{absent[0].name}` is not available: {absent[0].reason}.", absent[0].hint)


def _print(table: Table, err: bool = False) -> None:
    from rich.console import Console

    screen = Console(stderr=err, highlight=False, markup=False)
    if not screen.is_terminal:
        screen.width = PIPED_WIDTH
    screen.print(table)

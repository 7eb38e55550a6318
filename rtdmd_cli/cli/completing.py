"""What TAB offers for the values of options and arguments; where nothing fits, the shell offers files.

Each function takes what has been typed of the value and gives whole values, with a help text for shells that show one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import typer

RUNS = Path("runs")
Offers = list[tuple[str, str]]
"""Values, each with its help text."""


def _fitting(offers: Iterable[tuple[str, str]], incomplete: str) -> Offers:
    return [(name, text) for name, text in offers if name.startswith(incomplete)]


def presets(incomplete: str) -> Offers:
    """The shipped presets."""
    from rtdmd_cli.config.loader import preset_names

    return _fitting([(name, "preset") for name in preset_names()], incomplete)


def _runs(out: Path, incomplete: str) -> Offers:
    from rtdmd_cli.engine.storage.run_folder import is_run

    names = sorted(path.name for path in out.iterdir() if is_run(path)) if out.is_dir() else []
    return _fitting([(name, "run") for name in names], incomplete)


def runs(ctx: typer.Context, incomplete: str) -> Offers:
    """The runs under --out."""
    return _runs(Path(ctx.params.get("out") or RUNS), incomplete)


def runs_here(incomplete: str) -> Offers:
    """The runs under runs/, for commands whose --out is another folder."""
    return _runs(RUNS, incomplete)


def sources(incomplete: str) -> Offers:
    """What `--from` takes: runs under runs/, then presets."""
    return [*runs_here(incomplete), *presets(incomplete)]


def rewards(incomplete: str) -> Offers:
    """The rewards, also for the last of several names with commas between them."""
    from rtdmd_cli.engine.rewards.registry import REWARDS

    before, comma, last = incomplete.rpartition(",")
    found = _fitting([(entry.name, entry.measures) for entry in REWARDS.values()], last)
    return [(f"{before}{comma}{name}", text) for name, text in found]


def benchmarks(incomplete: str) -> Offers:
    """The benchmarks, and `list`."""
    from rtdmd_cli.engine.evaluation.benchmarks import BENCHMARKS

    offers = [(row.name, row.measures) for row in BENCHMARKS.values()]
    return _fitting([*offers, ("list", "show the benchmarks")], incomplete)


def weights(incomplete: str) -> Offers:
    """What can be fetched: models by their presets, and rewards."""
    return [*presets(incomplete), *rewards(incomplete)]


def data_sets(incomplete: str) -> Offers:
    """The public sets of prompts."""
    from rtdmd_cli.engine.prompts.public_sets import DATA

    return _fitting([(each.name, each.what) for each in DATA.values()], incomplete)


def keys(incomplete: str) -> Offers:
    """The keys of a preset, each with "=", for `--set`."""
    from rtdmd_cli.config.fields import dotted, keys

    offers = [(f"{dotted(path)}=", field.description or "") for path, field in keys().items()]
    return _fitting(offers, incomplete)

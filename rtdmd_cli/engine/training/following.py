"""A run's folder that is moved, renamed or deleted while the run trains: what was trained is not lost with it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from rtdmd_cli.engine.storage.disk_errors import os_errors
from rtdmd_cli.engine.storage.run_folder import RunFolder
from rtdmd_cli.errors import EnvironmentFailure


def identity(run: RunFolder) -> os.stat_result:
    """By which the folder is known again under another name. EnvironmentFailure where it can't be read."""
    with os_errors(run.path, "read"):
        return os.stat(run.path)


def found_again(run: RunFolder, known: os.stat_result) -> RunFolder | None:
    """The run where it lies now: at its place, or under another name beside it; None where it is neither."""
    if _is(run.path, known):
        return run
    try:
        beside = list(run.path.parent.iterdir())
    except OSError:  # the folder of runs is gone as well
        return None
    return next((RunFolder(path) for path in beside if _is(path, known)), None)


def new_name(path: Path) -> str:
    """For a run in the place of one that is gone: its own name, or another where something else is there by now."""
    return f"{path.name}.rescued-{secrets.token_hex(2)}" if os.path.lexists(path) else path.name


def gone(before: Path, run: RunFolder, iteration: int) -> EnvironmentFailure:
    """The error after a run's folder was lost and its state saved in a new one."""
    return EnvironmentFailure(
        f"{before} was moved or deleted while it trained: iteration {iteration} is saved in {run.path}, which is new.",
        f"Go on from there: --resume {run.path}",
    )


def _is(path: Path, known: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), known)
    except OSError:
        return False

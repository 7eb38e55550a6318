"""A run's folder that is moved, renamed or deleted while the run trains: what was trained is not lost with it."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rtdmd_cli.engine.storage import files
from rtdmd_cli.engine.storage.run_folder import RunFolder, create_run
from rtdmd_cli.errors import EnvironmentFailure

if TYPE_CHECKING:
    from rtdmd_cli.engine.training.session import Session


def identity(run: RunFolder) -> os.stat_result:
    """By which the folder is known again under another name. EnvironmentFailure where it can't be read."""
    with files.os_errors(run.path, "read"):
        return os.stat(run.path)


def follow(session: Session, save: Callable[[Session], None]) -> None:
    """Go on where the run's folder lies now: another name beside the old one is said.

    EnvironmentFailure where it is gone; a new run has a checkpoint of this iteration then. save: writes one.
    """
    assert session.folder is not None
    before, now = session.run.path, _found_again(session.run, session.folder)
    if now is not None and now.path == before:
        return
    if now is not None:
        session.run = now
        session.last = session.last and now.checkpoints / session.last.name
        session.say(f"{before} has been renamed: going on in {now.path}")
        return
    session.run, session.last = _made_again(session), None
    save(session)
    raise EnvironmentFailure(
        f"{before} was moved or deleted while it trained: iteration {session.iteration} is saved in {session.run.path}, "
        "which is new.",
        f"Go on from there: --resume {session.run.path}",
    )


def _found_again(run: RunFolder, known: os.stat_result) -> RunFolder | None:
    """The run where it lies now: at its place, or under another name beside it; None where it is neither."""
    if _is(run.path, known):
        return run
    try:
        beside = list(run.path.parent.iterdir())
    except OSError:  # the folder of runs is gone as well
        return None
    return next((RunFolder(path) for path in beside if _is(path, known)), None)


def _made_again(session: Session) -> RunFolder:
    """An empty run in the place of one that is gone; under a name of its own where something else is there by now."""
    path, device = session.run.path, session.trainer.backbone.device
    name = f"{path.name}.rescued-{secrets.token_hex(2)}" if os.path.lexists(path) else path.name
    return create_run(path.parent, name, session.resolved, sys.argv, device, session.stage.name)


def _is(path: Path, known: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), known)
    except OSError:
        return False

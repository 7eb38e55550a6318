"""Every command that writes, on a small model, run in this process; and what must hold of what it leaves."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path

import pytest
import torch

from rtdmd_cli.cli import app
from rtdmd_cli.engine.storage import files
from rtdmd_cli.engine.storage.disk import Disk
from scripts.torture import commands, trials
from scripts.torture.commands import COMMANDS, Command

SEED = int(os.environ.get("RTDMD_FAULTS_SEED", "0"))
EVERY = os.environ.get("RTDMD_FAULTS") == "all"
"""Try every call and every moment, which takes an hour, and not a sample of them by SEED."""

MORE = (
    Command("data fetch", ("data", "fetch", "geneval-val", "--quiet")),
    Command("runs compare", ("runs", "compare", "base", "other", "--out", "page.html", "--force", "--quiet")),
)
CASES = {command.name: command for command in (*COMMANDS, *MORE)}


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Within the block: this folder, a cache in it, one thread."""
    threads, before = torch.get_num_threads(), os.environ.get("RTDMD_CACHE")
    os.environ["RTDMD_CACHE"] = str(folder / "cache")
    torch.set_num_threads(1)
    try:
        with chdir(folder):
            yield
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("RTDMD_CACHE")
        if before is not None:
            os.environ["RTDMD_CACHE"] = before


def prepare(folder: Path) -> None:
    """What every case starts from: that of the kills, and a second run."""

    def here(where: Path, arguments: Sequence[str]) -> None:
        with working_in(where):
            assert app.main(list(arguments)) == 0

    commands.prepare(folder, folder.with_name("model"), here)
    shutil.copytree(folder / "runs" / commands.BASE, folder / "runs" / "other")


def run(folder: Path, case: Command, disk: Disk | None = None, again: bool = False) -> int:
    """The command in `folder` on that disk; its exit code."""
    with working_in(folder), pytest.MonkeyPatch.context() as patch:
        if disk is not None:
            patch.setattr(files, "disk", disk)
        return app.main([*case.arguments, *(case.again if again else ())])


def whole(folder: Path) -> None:
    """AssertionError where something has its name and is not whole, or a file of the user's is gone."""
    assert trials.broken(folder) == ""


def left(folder: Path) -> dict[str, str]:
    """Names and contents without times; of the folders of the model's own, nothing."""
    return trials.contents(folder)


def fresh(start: Path, place: Path) -> Path:
    """A copy of the prepared folder."""
    return Path(shutil.copytree(start, place, symlinks=True))

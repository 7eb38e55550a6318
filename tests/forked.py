"""What `tests.commands.fork` runs: the program in a process that has all imports already.

The standard library's fork server imports this module once and forks from there, in a process with one thread. The
program then starts in a fraction of a second, where `python -m rtdmd_cli` takes eight; the rest is the same: a process
of its own, with its folder, environment, output, signals and exit code.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from rtdmd_cli.engine.compute.importing import quick_imports

with quick_imports():  # as the commands have it
    import rtdmd_cli.cli.app
    import rtdmd_cli.cli.distill
    import rtdmd_cli.cli.eval
    import rtdmd_cli.cli.export
    import rtdmd_cli.cli.sample
    import rtdmd_cli.cli.tune_reward
    import rtdmd_cli.engine.backbones.sd3
    import rtdmd_cli.engine.distill.run
    import rtdmd_cli.engine.evaluation.run
    import rtdmd_cli.engine.export.run
    import rtdmd_cli.engine.rewards.shapes_clip
    import rtdmd_cli.engine.sampling.pictures
    import rtdmd_cli.engine.tune_reward.run  # noqa: F401

IMPORTED_IN = os.getpid()


def reopen_streams() -> None:
    """sys.stdout and sys.stderr as Python makes them for what descriptors 1 and 2 are now."""
    out = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    err = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = out  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = err  # type: ignore[misc]


def run(
    folder: Path, arguments: Sequence[str], environment: Mapping[str, str], output: Path, program: str
) -> None:
    """`PROGRAM ARGUMENTS` in `folder`; stdout and stderr go to the files `out` and `err` of `output`.

    program: a module with a function `main`, which takes its arguments from sys.argv.
    """
    assert os.getpid() != IMPORTED_IN, "the fork server could not import this module"
    for name, number in (("out", 1), ("err", 2)):
        descriptor = os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    reopen_streams()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [program, *arguments]
    code = import_module(program).main()
    with suppress(OSError):  # the reader has left
        sys.stdout.flush()
    os._exit(code)  # multiprocessing would flush once more, and fail

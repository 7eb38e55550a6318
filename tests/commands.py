"""The program as a person runs it: processes in a folder, how they ended, and what their runs hold."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from rtdmd_cli.engine.storage.run_folder import RunFolder
from tests import forked

ROOT = Path(__file__).parents[1]
ENDLESS = 1_000_000
LIMIT = 3600  # s, of one process: only a hang meets it, however busy the machine is
PROGRAM = "rtdmd_cli.cli.app"
TIMES = ("seconds", "iterations_per_second")


@dataclass(frozen=True)
class Done:
    """A process that has ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class World:
    """The folder in which the processes work, and how they ended by name."""

    folder: Path
    done: dict[str, Done]

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.folder / "runs" / name)

    def checkpoint(self, name: str, step: int) -> Path:
        return self.run(name).checkpoints / f"step-{step:06d}"


def environment(folder: Path) -> dict[str, str]:
    """Of a process in `folder`: one thread, no network, caches of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RTDMD_", "ACCELERATE_"))}
    own = {"RTDMD_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    own |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return clean | own


def launch(folder: Path, *module: str) -> subprocess.Popen[str]:
    """`python -m MODULE ARGUMENTS ...` in `folder`, with its `environment`."""
    return subprocess.Popen(
        [sys.executable, "-m", *module],
        cwd=folder,
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([forked.__name__])
_FORKING = threading.Lock()  # multiprocessing looks at all its processes whenever it starts one


class Forked:
    """A process of the program that was forked, as `fork` returns it, with the methods of a Popen that are used here."""

    def __init__(
        self, folder: Path, arguments: tuple[str, ...], more: Mapping[str, str], program: str
    ) -> None:
        self.output = Path(tempfile.mkdtemp())
        given = (folder, arguments, environment(folder) | more, self.output, program)
        self.process = _SERVER.Process(target=forked.run, args=given)
        start_server()
        with _FORKING:
            self.process.start()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        with _FORKING:
            return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.process.pid or 0, number)

    def end(self, limit: float) -> Done:
        """Its end, within `limit` seconds; after that it is killed, and TimeoutExpired is raised."""
        deadline = time.monotonic() + limit
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired("fork", limit)
            time.sleep(0.01)
        out, err = ((self.output / name).read_text("utf-8") for name in ("out", "err"))
        shutil.rmtree(self.output)
        return Done(code, out, err)


def start_server() -> None:
    """Start this process's fork server, of which there is one, with all imports; one that runs goes on.

    The libraries read some variables when they are imported.
    """
    before = dict(os.environ)
    os.environ.update(environment(Path(tempfile.gettempdir())))
    try:
        with _FORKING:
            forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def fork(folder: Path, *arguments: str, program: str = PROGRAM, **environ: str) -> Forked:
    """`rtdmd ARGUMENTS ...` in `folder`, with its `environment` and `environ`, in a process that has all imports.

    program: the module of another one, see `forked.run`.
    """
    return Forked(folder, arguments, environ, program)


def wait(process: subprocess.Popen[str] | Forked, limit: float = LIMIT) -> Done:
    """Its end, within `limit` seconds; after that it is ended, and TimeoutExpired is raised."""
    if isinstance(process, Forked):
        return process.end(limit)
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # not killed: a launcher has to end its own processes
        raise
    return Done(process.returncode, out, err)


def signalled(
    process: subprocess.Popen[str] | Forked,
    run: RunFolder,
    number: signal.Signals,
    when: Callable[[RunFolder], bool],
    limit: float = LIMIT,
) -> Done:
    """Send a training a signal as soon as `when` holds of its run folder, and wait for its end."""
    send_when(process, run, number, when, limit)
    return wait(process, limit)


def send_when(
    process: subprocess.Popen[str] | Forked,
    run: RunFolder,
    number: signal.Signals,
    when: Callable[[RunFolder], bool],
    limit: float = LIMIT,
) -> None:
    """Send a training a signal as soon as `when` holds of its run folder, or after `limit` seconds."""
    end = time.monotonic() + limit
    while process.poll() is None and not when(run) and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(number)


def as_overrides(section: str, values: Mapping[str, object]) -> list[str]:
    """`--set SECTION.KEY=VALUE` for each."""
    return [word for key, value in values.items() for word in ("--set", f"{section}.{key}={value}")]


def contents(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """The files of a folder by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern))}


def newest(run: RunFolder) -> int:
    """Iteration, or epoch, of the newest line of metrics.jsonl."""
    rows = run.metrics.read()
    return int(rows[-1]["iteration"]) if rows else 0


def steps(run: RunFolder) -> list[int]:
    """Of its checkpoints."""
    return sorted(int(path.name.removeprefix("step-")) for path in run.checkpoints.glob("step-*"))


def timeless(run: RunFolder, last: int = ENDLESS) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their times."""
    rows = [row for row in run.metrics.read() if row["iteration"] <= last]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]

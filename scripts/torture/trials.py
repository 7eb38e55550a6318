"""One trial: a command in a process of its own, killed, run again to its end, and compared with an undisturbed one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.torture.commands import MINE, Command

VOLATILE = (
    "log.txt",
    "environment.json",
    "report.html",
    "report.md",
    "timing.jsonl",
    "evaluation.json",
    "manifest.json",
)
"""Files with times, or hashes of them, of which only the name is compared."""
LIMIT = 900.0  # s; a process that takes longer hangs


def start(folder: Path, arguments: Sequence[str], setup: Callable[[], Any] = lambda: None) -> int:
    """Fork a process that runs the command in `folder`; its id. setup: called in it first.

    A fork has all modules already, so that it takes a second where a new process takes ten.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.chdir(folder)
        log = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["RTDMD_CACHE"] = str(folder / "cache")
        setup()
        from rtdmd_cli.cli.app import main

        code = main(list(arguments))
        sys.stdout.flush()
    finally:
        os._exit(code)


def end(child: int, limit: float = LIMIT) -> int:
    """Wait for a process; its exit code, negative for a signal. It is killed after `limit` seconds, a TimeoutError."""
    deadline = time.monotonic() + limit
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"a process took longer than {limit:.0f} s")
        time.sleep(0.01)


def run(folder: Path, arguments: Sequence[str]) -> None:
    """The command, undisturbed. RuntimeError where it fails."""
    code = end(start(folder, arguments))
    if code:
        tail = (folder / "output.txt").read_text("utf-8")[-2000:]
        raise RuntimeError(f"rtdmd {' '.join(arguments)} ended with {code}:\n{tail}")


def count_calls() -> None:
    """In a process that was forked: write the number of calls of the disk into `calls` when it ends."""
    from rtdmd_cli.engine.storage import files
    from scripts.torture.disks import CountingDisk

    files.disk = CountingDisk(Path("calls").resolve())


def kill_at(call: int, alone: bool = False) -> None:
    """In a process that was forked: SIGKILL instead of the `call`-th call of the disk.

    alone: in the middle of the `call`-th write to a file that stands alone.
    """
    from rtdmd_cli.engine.storage import files
    from scripts.torture.disks import KillingDisk

    files.disk = KillingDisk(call, alone)


@dataclass(frozen=True)
class Reference:
    """An undisturbed command: what it left, its seconds, its calls of the disk.

    writes: those of the calls that write a file that stands alone, as status.json and metrics.jsonl do; other files lie
    in folders that get their names when they are whole.
    """

    command: Command
    left: dict[str, str]
    seconds: float
    calls: int
    writes: int


def measure(start_from: Path, work: Path, command: Command) -> Reference:
    """Run a command undisturbed."""
    folder = work / f"reference-{command.name.replace(' ', '')}"
    shutil.copytree(start_from, folder)
    began = time.monotonic()
    code = end(start(folder, command.arguments, count_calls))
    assert code == 0, (folder / "output.txt").read_text("utf-8")[-2000:]
    seconds = time.monotonic() - began
    counts = [int((folder / name).read_text()) for name in ("calls", "writes")]
    reference = Reference(command, contents(folder), seconds, *counts)
    shutil.rmtree(folder)
    return reference


@dataclass(frozen=True)
class Trial:
    """What one kill did, and when: `instant`, seconds after the start, `call` of the disk, or `write`, as `Reference` has it.

    lost: "" for nothing.
    """

    command: str
    instant: float | None
    call: int | None
    killed: bool
    lost: str
    write: int | None = None


def attempt(
    start_from: Path,
    work: Path,
    reference: Reference,
    instant: float | None = None,
    call: int | None = None,
    write: int | None = None,
) -> Trial:
    """Kill the command once, look at what is left, run it to its end and compare; only look where it ended before.

    One of instant, call and write is given: see `Trial`.
    """
    command, folder = reference.command, work / "trial"
    shutil.copytree(start_from, folder)
    at = call if write is None else write
    if at is not None:
        code = end(start(folder, command.arguments, lambda: kill_at(at, alone=write is not None)))
    else:
        child = start(folder, command.arguments)
        time.sleep(instant or 0.0)
        os.kill(child, signal.SIGKILL)
        code = end(child)
    lost, killed = broken(folder), code == -signal.SIGKILL
    if not lost and killed:
        again = end(start(folder, (*command.arguments, *command.again)))
        tail = (folder / "output.txt").read_text("utf-8")[-500:]
        lost = (
            f"the second try ended with {again}: {tail}"
            if again
            else differing(reference.left, contents(folder))
        )
    if not lost:
        shutil.rmtree(folder)
    else:
        folder.rename(work / f"lost-{time.time_ns()}")
    return Trial(command.name, instant, call, killed, lost, write)


def broken(folder: Path) -> str:
    """What is not whole right after a kill, although it has its name; "" for nothing."""
    from rtdmd_cli.engine.storage import checkpoint, exported, strict_json
    from rtdmd_cli.errors import RtdmdError

    try:
        for path in finished(folder, "runs/*/checkpoints/step-*"):
            checkpoint.verify_checkpoint(path)
        for path in finished(folder, "exports/*/"):
            if not (path / "mine").exists():
                exported.read_exported(path)
        for path in (*finished(folder, "runs/*/*.json"), *finished(folder, "evals/*/*.json")):
            strict_json.read(path)
        for path in finished(folder, "runs/*/report.html"):
            if not path.read_bytes().endswith(b"</html>\n"):
                return f"{path} is not whole"
    except (RtdmdError, ValueError) as error:
        return str(error)
    gone = [name for name, text in MINE.items() if not _is(folder / name, text)]
    return f"{gone[0]} is gone" if gone else ""


def finished(folder: Path, pattern: str) -> list[Path]:
    """What has its final name, and so do the folders that it lies in."""
    found = folder.glob(pattern)
    return [path for path in found if ".tmp-" not in path.relative_to(folder).as_posix()]


def _is(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text("utf-8") == text


def contents(folder: Path) -> dict[str, str]:
    """Every file but caches and outputs: its name, and a hash of what is the same each time."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith("cache/") and name not in ("output.txt", "calls", "writes"):
            data = _timeless(path).replace(str(folder).encode(), b"HERE")  # presets hold whole paths
            found[name] = "" if path.name in VOLATILE else hashlib.sha256(data).hexdigest()
    leftovers = [path for path in (folder / "cache").rglob(".tmp-*") if path.is_dir()]
    return found | {path.relative_to(folder).as_posix(): "" for path in leftovers}


def _timeless(path: Path) -> bytes:
    """A file's bytes; of JSON what is no time, where it is JSON from the first line to the last."""
    data = path.read_bytes()
    try:
        return _timeless_json(path, data)
    except ValueError:
        return data


def _timeless_json(path: Path, data: bytes) -> bytes:
    if path.suffix == ".json":
        return json.dumps(_without_times(json.loads(data)), sort_keys=True).encode()
    if path.suffix == ".jsonl":
        rows = [_without_times(json.loads(line)) for line in data.splitlines()]
        rows.sort(
            key=lambda row: str(row.get("file", ""))
        )  # pictures that were there get their line at the next start
        return json.dumps(rows, sort_keys=True).encode()
    return data


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: _without_times(v) for k, v in value.items() if "second" not in k and k not in ("time", "date")
        }
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def differing(expected: dict[str, str], found: dict[str, str]) -> str:
    """The first files that are missing, too many or different; "" for none."""
    missing = sorted(expected.keys() - found.keys())
    more = sorted(found.keys() - expected.keys())
    other = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    kinds = {"missing": missing, "too many": more, "different": other}
    return "; ".join(f"{kind}: {', '.join(names[:4])}" for kind, names in kinds.items() if names)

"""Real processes that lose their reader or their terminal, and what they do on the network."""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from rtdmd_cli.engine.storage.run_folder import RunFolder
from scripts.torture.commands import PROMPTS
from tests.commands import LIMIT, environment, newest
from tests.faults.cases import CASES, prepare

PROGRAM = [sys.executable, "-m", "rtdmd_cli"]
STRACE = ["strace", "-f", "--seccomp-bpf", "-e", "trace=connect,sendto,sendmsg,sendmmsg"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("terminal") / "work"
    prepare(place)
    return place


def distill(name: str, iterations: int) -> list[str]:
    given = [word if word != "one" else name for word in CASES["distill"].arguments if word != "--quiet"]
    rhythm = {"save_every": 1_000_000, "sample_every": 0, "iterations": iterations}
    return [*PROGRAM, *given, *(word for k, v in rhythm.items() for word in ("--set", f"distill.{k}={v}"))]


def test_a_reader_that_leaves_does_not_end_a_training(folder: Path) -> None:
    """`rtdmd distill 2>&1 | head -1`: what can't be written is dropped, and the training goes on."""
    reading, writing = os.pipe()
    process = subprocess.Popen(
        distill("read", 6), cwd=folder, env=environment(folder), stdout=subprocess.DEVNULL, stderr=writing
    )
    os.close(writing)
    assert os.read(reading, 1)  # the first line has come, and the reader leaves
    os.close(reading)
    assert process.wait(LIMIT) == 0
    run = RunFolder(folder / "runs" / "read")
    assert (run.status()["state"], run.status()["iteration"], newest(run)) == ("finished", 6, 6)
    assert (run.checkpoints / "step-000006").is_dir()


def test_a_terminal_that_is_closed_saves_as_a_ctrl_c_does(folder: Path) -> None:
    """SIGHUP, and a terminal whose writes fail: the iteration is finished and saved, the exit code is 129."""
    leader, terminal = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *distill("closed", 1_000_000)],
        cwd=folder,
        env=environment(folder),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    run, over = RunFolder(folder / "runs" / "closed"), threading.Event()

    def close_when_training() -> None:
        os.set_blocking(leader, False)
        while not over.wait(0.02):
            with suppress(OSError):
                os.read(leader, 65536)  # a terminal that nobody reads would be full
            if newest(run) >= 2:
                break
        os.close(leader)

    closer = threading.Thread(target=close_when_training)
    closer.start()
    try:
        assert process.wait(LIMIT) == 129
    finally:
        over.set()
        closer.join()
    status = run.status()
    assert status["state"] == "interrupted" and status["iteration"] == newest(run) >= 2
    assert (run.checkpoints / f"step-{status['iteration']:06d}").is_dir()


def can_trace() -> bool:
    """Whether strace is here and may trace, which containers can forbid."""
    tried = [*STRACE, "-o", os.devnull, sys.executable, "-c", ""]
    return shutil.which("strace") is not None and subprocess.run(tried, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_trace(), reason="strace is not installed, or may not trace")
def test_a_sample_asks_no_host_and_leaves_nothing_in_the_home_folder(folder: Path) -> None:
    home, trace = folder / "home", folder / "trace"
    home.mkdir()
    arguments = ["sample", PROMPTS[0], "--from", "runs/base", "--out", "traced", "--quiet"]
    subprocess.run(
        [*STRACE, "-o", str(trace), *PROGRAM, *arguments],
        cwd=folder,
        env=environment(folder) | {"HOME": str(home)},
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=LIMIT,
    )
    calls = trace.read_text("utf-8", "replace")
    assert not re.findall(r".*AF_INET6?.*", calls), "no host is asked"
    written = [path for path in home.rglob("*") if path.is_file()]
    assert not [
        path for path in written if "onnx" in path.as_posix().lower() or "device" in path.name.lower()
    ]


def test_nohup_goes_on_without_a_terminal(folder: Path) -> None:
    """SIGHUP was ignored when the program started, and stays so."""
    process = subprocess.Popen(
        ["nohup", *distill("nohup", 12)],
        cwd=folder,
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    run = RunFolder(folder / "runs" / "nohup")
    while process.poll() is None and newest(run) < 1:
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    assert process.wait(LIMIT) == 0
    assert run.status()["state"] == "finished"

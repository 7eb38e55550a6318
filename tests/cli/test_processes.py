"""Both stages in two CPU processes (gloo), through the real commands: as one process with the same batch.

The runs of `world` are made once; the tests look at what they left behind. Of those in two processes, "two" and
"broken" come through the launcher; the others' processes are forked and get the variables that it would set.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from rtdmd_cli.cli import launching
from rtdmd_cli.cli.launching import children, cores, end_children, end_followers, not_ignored, without_option
from rtdmd_cli.engine.storage.checkpoint import checkpoint_steps, load_checkpoint
from rtdmd_cli.engine.storage.run_folder import RunFolder
from tests.cli.test_distill import write_preset
from tests.commands import (
    ENDLESS,
    PROGRAM,
    Done,
    World,
    as_overrides,
    fork,
    launch,
    send_when,
    signalled,
    wait,
)
from tests.engine.compute import two_processes

TWO = ("--processes", "2")
TUNING = {
    "prompts": "tiny.txt",
    "images_per_epoch": 8,
    "images_per_prompt": 4,
    "lora.rank": 2,
    "lora.alpha": 2,
    "generator_lr": 0.01,
    "fake_lr": 0.01,
    "epochs": 2,
    "sample_every": 0,
    "eval_images": 2,
}
TILTED = ("--set", "tune_reward.matching=distill", "--set", "tune_reward.tilt=1")


def distill(name: str, iterations: int, *arguments: str) -> tuple[str, ...]:
    given = ("--preset", "tiny.yaml", "--name", name, "--set", f"distill.iterations={iterations}")
    return ("distill", *given, *arguments)


def tune(name: str, *arguments: str) -> tuple[str, ...]:
    given = (*as_overrides("tune_reward", TUNING), "--set", "distill.eps=0.001", "--reward", "shapes-clip")
    return ("tune-reward", *given, "--from", "runs/one", "--name", name, "--json", *arguments)


def fork_both(folder: Path, *arguments: str, program: str = PROGRAM) -> tuple[Done, Done]:
    """The command in two forked processes; how they ended."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2))
    first, second = [fork(folder, *arguments, program=program, **meeting, **rank) for rank in ranks]
    return wait(first), wait(second)


def both(folder: Path, *arguments: str) -> Done:
    """The command in two forked processes; how the one that speaks ended, if the other ended well too."""
    speaking, silent = fork_both(folder, *arguments)
    assert (silent.code, silent.out) == (speaking.code, ""), silent.err
    return speaking


def has_gone_on(run: RunFolder) -> bool:
    """Whether it has trained on after a checkpoint."""
    steps = checkpoint_steps(run.checkpoints)
    return bool(steps) and int(run.metrics.read()[-1]["iteration"]) > steps[-1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """ "one": 4 iterations in one process; "two": 2 in two, then 2 more in two; both stages' second; a broken run."""
    folder = tmp_path_factory.mktemp("processes")
    write_preset(folder)
    done = {"one": wait(fork(folder, *distill("one", 4, "--json")))}
    done["two"] = wait(launch(folder, "rtdmd_cli", *distill("two", 2, *TWO, "--json")))
    done["two resumed"] = both(folder, *distill("two", 4, "--json", "--resume", "auto"))
    for kind, settings in (("tuned", ()), ("tilted", TILTED)):
        done[f"{kind} one"] = wait(fork(folder, *tune(f"{kind}-one", *settings)))
        done[f"{kind} two"] = both(folder, *tune(f"{kind}-two", *settings))
    seldom = ("--set", f"distill.save_every={ENDLESS}")
    broken = launch(folder, "rtdmd_cli", *distill("broken", ENDLESS, *TWO, *seldom))
    run = RunFolder(folder / "runs/broken")
    send_when(broken, run, signal.SIGUSR1, lambda r: bool(r.metrics.read()))
    done["broken"] = signalled(broken, run, signal.SIGTERM, has_gone_on)
    return World(folder, done)


def same_weights(one: Path, other: Path) -> None:
    left, right = load_checkpoint(one), load_checkpoint(other)
    assert left.tensors.keys() == right.tensors.keys()
    for group, tensors in left.tensors.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(right.tensors[group][name], tensor, rtol=2e-3, atol=2e-5)


def test_stage_1_in_two_processes_and_resumed_is_that_of_one(world: World) -> None:
    for name in ("one", "two", "two resumed"):
        assert world.done[name].code == 0, world.done[name].err
    result = json.loads(world.done["two resumed"].out)
    assert result["iterations"] == 4 and result["finished"]
    step = "checkpoints/step-000004"
    same_weights(world.run("one").path / step, world.run("two").path / step)
    rows, others = (world.run(name).metrics.read() for name in ("one", "two"))
    assert [row["iteration"] for row in others] == [1, 2, 3, 4]
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for figure in ("fake_loss", "consistency_loss", "fake_grad_norm"):
            assert other[figure] == pytest.approx(row[figure], rel=1e-3, abs=1e-5)
    assert world.run("two").status()["state"] == "finished" and world.run("two").report.is_file()


def test_one_process_speaks_for_both(world: World) -> None:
    assert world.done["two"].err.count("4 prompts, ") == 1
    assert world.done["two"].err.count("model ") == world.done["one"].err.count("model ")


@pytest.mark.parametrize("kind", ["tuned", "tilted"])
def test_stage_2_in_two_processes_is_that_of_one(world: World, kind: str) -> None:
    for name in (f"{kind} one", f"{kind} two"):
        assert world.done[name].code == 0, world.done[name].err
    step = "checkpoints/step-000002"
    same_weights(world.run(f"{kind}-one").path / step, world.run(f"{kind}-two").path / step)
    before, after = (json.loads(world.done[f"{kind} {name}"].out)["rewards"] for name in ("one", "two"))
    assert after["shapes-clip"]["after"] == pytest.approx(before["shapes-clip"]["after"], abs=1e-3)
    rows, others = (world.run(f"{kind}-{name}").metrics.read() for name in ("one", "two"))
    for row, other in zip(rows, others, strict=True):
        assert other["reward/shapes-clip"] == pytest.approx(row["reward/shapes-clip"], abs=1e-4)
        assert ("tilt_effective" in row) == (kind == "tilted")
        assert other.get("tilt_effective", 0.0) == pytest.approx(row.get("tilt_effective", 0.0), abs=1e-3)


def test_one_signal_saves_and_the_other_stops_both_after_saving(world: World) -> None:
    run, done = world.run("broken"), world.done["broken"]
    assert done.code == 143, done.err
    status = run.status()
    assert status["state"] == "interrupted"
    asked_for, last = checkpoint_steps(run.checkpoints)
    assert asked_for < last == status["iteration"]
    assert done.err.count("SIGUSR1: the last checkpoint") == 1


def test_the_launcher_passes_the_command_on_without_its_own_option() -> None:
    given = ["distill", "--processes", "2", "--set", "a=b", "--processes=3", "--json"]
    assert without_option(given) == ["distill", "--set", "a=b", "--json"]


def test_the_launcher_leaves_ignored_signals_to_nohup() -> None:
    assert {"SIGTERM", "SIGHUP"} <= set(not_ignored())
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert "SIGHUP" not in not_ignored() and "SIGTERM" in not_ignored()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_launcher_finds_the_processes_that_a_second_signal_is_for() -> None:
    with subprocess.Popen(["sleep", "3600"]) as process:
        assert process.pid in children()
        process.kill()
    assert process.pid not in children()


DEAF = (
    "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(flush=True); time.sleep(3600)"
)
"""As a process that waits for another one inside a library."""


def deaf(rank: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, env={"RANK": rank})
    assert process.stdout is not None and process.stdout.readline()
    return process


def test_a_second_signal_ends_processes_that_hear_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "AT_ONCE", 0.3)
    process = deaf("0")
    end_children(signal.SIGINT)
    assert process.wait(10) == -signal.SIGKILL


def test_processes_that_wait_for_a_main_one_that_has_gone_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own end may be waited for for six hours; a helper of the launcher's is no such process."""
    monkeypatch.setattr(launching, "GRACE", 0.3)
    main, follower, helper = deaf("0"), deaf("1"), deaf("")
    over = threading.Event()
    watch = threading.Thread(target=end_followers, args=(threading.get_native_id(), over), daemon=True)
    watch.start()
    time.sleep(1.5)
    assert main.poll() is None and follower.poll() is None
    main.kill()
    assert follower.wait(10) == -signal.SIGKILL and helper.poll() is None
    over.set()
    helper.kill()
    assert (main.wait(10), helper.wait(10)) == (-signal.SIGKILL, -signal.SIGKILL)


def test_threads_are_those_of_the_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda number: {3, 5, 7})
    assert cores() == (3 if sys.platform == "linux" else 64)


def test_what_happens_in_one_process_is_known_to_all(tmp_path: Path) -> None:
    """Two processes: sums, rows in order, and a failure of one that stops the other."""
    done = fork_both(tmp_path, program=two_processes.__name__)
    assert [each.out.splitlines()[-1:] for each in done] == [
        ["process 0: all right, other stopped with 5"],
        ["process 1: all right, stopped with 5"],
    ], [each.err for each in done]

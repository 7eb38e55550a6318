"""Each command whose disk fails, or whose process gets a signal, at one of its calls; and the power that goes at any moment.

Every call and moment is tried with RTDMD_FAULTS=all; else a sample of them by RTDMD_FAULTS_SEED.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from rtdmd_cli.engine.compute import signals
from rtdmd_cli.engine.distill import run as distilling
from rtdmd_cli.engine.storage.checkpoint import checkpoint_steps
from rtdmd_cli.engine.storage.run_folder import RunFolder
from rtdmd_cli.engine.training.trainer import Trainer
from scripts.torture.commands import Command
from tests.faults.cases import CASES, EVERY, SEED, fresh, left, prepare, run, whole
from tests.faults.disks import (
    ActingDisk,
    FailingDisk,
    RecordingDisk,
    after_crash,
    lay_out,
    moments,
)

T = TypeVar("T")
NUMBERS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EMFILE)
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def sample(everything: Sequence[T], count: int, *key: object) -> list[T]:
    """So many of them, by seed and key, or all."""
    if EVERY or len(everything) <= count:
        return list(everything)
    return random.Random(f"{SEED} {key}").sample(everything, count)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "start"
    prepare(folder)
    return folder


class Reference:
    """An undisturbed run of a case: its disk's record, and what it left."""

    def __init__(self, start: Path, place: Path, case: Command) -> None:
        folder = fresh(start, place)
        self.disk = RecordingDisk(folder)
        assert run(folder, case, self.disk) == 0
        self.left = left(folder)
        counting = ActingDisk((), lambda: None)
        shutil.rmtree(folder)
        assert run(fresh(start, place), case, counting) == 0
        self.calls = counting.count
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def references(start: Path) -> Iterator[dict[str, Reference]]:
    yield {}


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def reference(name: str, start: Path, references: dict[str, Reference], tmp_path: Path) -> Reference:
    if name not in references:
        references[name] = Reference(start, tmp_path / "reference", CASES[name])
    return references[name]


def goes_on(folder: Path, name: str, reference: Reference) -> None:
    """The same command again ends well, with the undisturbed run's results and nothing left behind.

    A run that was stopped may have pictures of the moment besides.
    """
    whole(folder)
    assert run(folder, CASES[name], again=True) == 0
    found = left(folder)
    more = [
        path for path in found.keys() - reference.left.keys() if "/samples/" not in path or ".tmp-" in path
    ]
    assert more == [] and {path: found.get(path) for path in reference.left} == reference.left


def test_a_call_that_fails_is_named_and_nothing_is_lost(
    name: str, reference: Reference, start: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for call in sample(range(1, reference.calls + 1), 2, name, "fails"):
        number = NUMBERS[call % len(NUMBERS)]
        folder, disk = fresh(start, tmp_path / f"call-{call}"), FailingDisk(call, number, stays=call % 2 == 0)
        capfd.readouterr()
        code = run(folder, CASES[name], disk)
        err = capfd.readouterr().err
        assert disk.failed and code in (0, 3), (call, code, err)
        if code == 3:
            assert err.startswith("error: Cannot ") and os.strerror(number).lower() in err, err
            assert "\nhint: " in err and "internal" not in err
        goes_on(folder, name, reference)


def test_a_signal_at_any_call_saves_what_there_is(
    name: str, reference: Reference, start: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    every = [(number, call) for number in CODES for call in range(1, reference.calls + 1)]
    for number, call in sample(every, 1, name, "signal"):
        folder = fresh(start, tmp_path / f"{number}-{call}")
        disk = ActingDisk((call,), partial(os.kill, os.getpid(), number))
        capfd.readouterr()
        code = run(folder, CASES[name], disk)
        err = capfd.readouterr().err
        assert code in (0, CODES[number]), (call, err)
        assert code == 0 or "stopped" in err or "--quiet" in CASES[name].arguments
        assert "Traceback" not in err
        goes_on(folder, name, reference)


def test_the_second_signal_stops_at_once_and_the_last_checkpoint_is_kept(
    start: Path, references: dict[str, Reference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "APART", 0.0)
    for name in ("distill", "tune-reward"):
        if name not in references:
            references[name] = Reference(start, tmp_path / "reference", CASES[name])
        total = references[name].calls
        for call in sample(range(1, total), 1, name, "twice"):
            folder = fresh(start, tmp_path / f"{name}-{call}")
            disk = ActingDisk((call, call + 1), lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert run(folder, CASES[name], disk) in (0, 143)
            goes_on(folder, name, references[name])


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Something happens in the second iteration of a distillation."""
    real = distilling.iterate

    def iterate(trainer: Trainer, iteration: int) -> None:
        if iteration == 1:
            act()
        real(trainer, iteration)

    monkeypatch.setattr(distilling, "iterate", iterate)


def test_a_run_that_is_renamed_while_it_trains_goes_on_there(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fresh(start, tmp_path / "here")
    before, now = folder / "runs" / "one", RunFolder(folder / "runs" / "elsewhere")
    meanwhile(monkeypatch, lambda: before.rename(now.path))
    assert run(folder, CASES["distill"]) == 0
    whole(folder)
    assert not before.exists() and now.status()["state"] == "finished" and now.status()["iteration"] == 3
    assert [row["iteration"] for row in now.metrics.read()] == [0, 1, 2, 3]
    assert checkpoint_steps(now.checkpoints) == [2, 3]


def test_a_run_that_is_deleted_while_it_trains_is_saved(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = fresh(start, tmp_path / "here")
    made = RunFolder(folder / "runs" / "one")
    with monkeypatch.context() as patch:
        meanwhile(patch, lambda: shutil.rmtree(made.path))
        assert run(folder, CASES["distill"]) == 3
    assert "was moved or deleted while it trained: iteration 2 is saved in runs/one" in capfd.readouterr().err
    assert made.status()["state"] == "failed" and checkpoint_steps(made.checkpoints) == [2]
    assert run(folder, CASES["distill"], again=True) == 0
    whole(folder)
    assert made.status()["state"] == "finished" and checkpoint_steps(made.checkpoints) == [2, 3]


def test_the_power_goes_at_any_moment(name: str, reference: Reference, tmp_path: Path) -> None:
    """What was not flushed is there, lost, or lost here and there, whatever came after it: old or new, always whole."""
    draw = random.Random(f"{SEED} {name}")
    for moment in sample(list(moments(reference.disk)), 25, name, "power"):
        for forgotten in (0.0, 0.5, 1.0):
            folder = tmp_path / f"{moment}-{forgotten}"
            lay_out(after_crash(reference.disk, moment, forgotten, draw), folder)
            whole(folder)
            if not EVERY:
                shutil.rmtree(folder)


def test_after_the_power_went_the_same_command_goes_on(
    name: str, reference: Reference, tmp_path: Path
) -> None:
    draw = random.Random(f"{SEED} {name} on")
    for moment in sample(list(moments(reference.disk)), 1, name, "on"):
        folder = reference.disk.root  # a run keeps the path of its prompts
        folder.parent.mkdir(exist_ok=True)
        lay_out(after_crash(reference.disk, moment, 0.5, draw), folder)
        goes_on(folder, name, reference)
        shutil.rmtree(folder)

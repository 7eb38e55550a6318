"""A tracker that is really installed gets rows and grids; without its package the test is skipped."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.engine.compute.processes import Processes
from rtdmd_cli.engine.storage.run_folder import RunFolder, State, create_run
from rtdmd_cli.engine.training.opening import opened
from rtdmd_cli.engine.training.start import Start
from rtdmd_cli.engine.training.trackers import open_tracker, require_tracker
from rtdmd_cli.errors import EnvironmentFailure

WANDB = """
import os
from types import SimpleNamespace

config = SimpleNamespace(update=lambda values, **given: None)
begun = []

def setup():
    return SimpleNamespace(settings=SimpleNamespace(mode=os.environ.get("WANDB_MODE", "online")))

def login(prompt=True):
    assert not prompt
    key = os.environ.get("WANDB_API_KEY")
    if key == "refused":
        raise RuntimeError("Failed to verify credentials.\\nAnd more.")
    return key is not None

def init(**given):
    if os.environ.get("WANDB_API_KEY") == "late":
        raise RuntimeError("The network is gone.")
    begun.append(given)
    return SimpleNamespace(log=lambda values, step: None, finish=lambda: None)
"""
"""What trackers.py and accelerate call of wandb 0.31, with answers that it has been seen to give."""


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for the package, without a login; the file in which its version is."""
    from accelerate import tracking

    (tmp_path / "wandb.py").write_text(WANDB)
    (tmp_path / "wandb-0.31.0.dist-info").mkdir()
    metadata = tmp_path / "wandb-0.31.0.dist-info/METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: wandb\nVersion: 0.31.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.WANDB])
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return metadata


def test_tensorboard_takes_rows_and_grids(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("RGB", (40, 24), (255, 0, 0)).save(tmp_path / "grid.png")
    with open_tracker("tensorboard", tmp_path, {"distill.lr": 0.1, "distill.prompts": None}) as tracker:
        tracker.show(tmp_path / "grid.png", 3)
        tracker.log({"iteration": 3, "fake_loss": 0.5})
    events = EventAccumulator(str(tmp_path / "rtdmd"))
    events.Reload()
    assert [(each.step, each.value) for each in events.Scalars("fake_loss")] == [(3, 0.5)]
    assert [(each.step, each.width, each.height) for each in events.Images("samples")] == [(3, 40, 24)]


def test_tensorboard_hides_what_a_resume_does_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((0, 5), (4, 4)):
        with open_tracker("tensorboard", tmp_path, {"distill.lr": 0.1}, first=first) as tracker:
            for iteration in range(first, last + 1):
                tracker.log({"iteration": iteration, "fake_loss": float(first)})
    events = EventAccumulator(str(tmp_path / "rtdmd"))
    events.Reload()
    assert [(each.step, each.value) for each in events.Scalars("fake_loss")] == [
        *((step, 0.0) for step in range(4)),
        (4, 4.0),
    ]


def test_wandb_goes_on_with_the_run_that_it_has(
    tmp_path: Path, wandb: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "good")
    resolved = load_preset("shapes-4step", ["hardware.tracker=wandb"], {})
    place = tmp_path / "mine"

    def make() -> RunFolder:
        return create_run(tmp_path, "mine", resolved, ["rtdmd"], torch.device("cpu"))

    for start in (Start(None, None), Start(RunFolder(place), None)):
        with opened(start, place, make, resolved, 2, Processes(), lambda text: None, no_report, True):
            pass
    begun = {"project": "rtdmd", "name": "mine", "id": RunFolder(place).id, "resume": "allow"}
    told = importlib.import_module("wandb").begun
    assert begun["id"] and told == [begun, begun]
    monkeypatch.setenv("WANDB_MODE", "offline")  # then there is no run to be found
    with open_tracker("wandb", place, {}, run_id="7f"):
        pass
    assert told[2] == {"project": "rtdmd", "name": "mine"}


def no_report(run: RunFolder, state: State, done: int) -> None:
    """Nothing to be seen of it here."""


def test_trackio_prints_on_stderr_and_nothing_when_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    printed = {}
    for quiet in (False, True):
        with open_tracker("trackio", tmp_path, {"distill.lr": 0.1}, quiet) as tracker:
            tracker.log({"iteration": 3, "fake_loss": 0.5})
        printed[quiet] = capfd.readouterr()
    assert "rtdmd" in printed[False].err and printed[False].out == ""
    assert printed[True] == ("", "")


def test_a_folder_of_a_tracker_is_not_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb makes ./wandb, which `python -m rtdmd_cli` finds there."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(EnvironmentFailure, match="wandb is not installed"):
        require_tracker("wandb")


def test_wandb_without_a_login_is_said_before_anything_is_loaded(
    wandb: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, reason in ((None, "has no login"), ("refused", "can't log in: Failed to verify credentials.$")):
        if key:
            monkeypatch.setenv("WANDB_API_KEY", key)
        with pytest.raises(EnvironmentFailure, match=reason) as caught:
            require_tracker("wandb")
        assert caught.value.hint == "Run `wandb login`, or set WANDB_MODE=offline."
    for mode in ("offline", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        require_tracker("wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "good")
    require_tracker("wandb")
    wandb.write_text(wandb.read_text().replace("0.31.0", "0.30.9"))
    with pytest.raises(EnvironmentFailure, match="wandb 0.30.9 is older than 0.31"):
        require_tracker("wandb")


def test_a_tracker_that_cannot_begin_is_a_failure_of_the_machine(
    tmp_path: Path, wandb: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "late")
    with (
        pytest.raises(EnvironmentFailure, match="wandb could not begin: The network is gone.$") as caught,
        open_tracker("wandb", tmp_path, {"distill.lr": 0.1}),
    ):
        pass
    assert "--set hardware.tracker=none" in caught.value.hint

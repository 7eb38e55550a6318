"""A tracker that is really installed gets rows and grids; without its package the test is skipped."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

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

"""A tracker that is really installed gets rows and grids; without its package the test is skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from rtdmd_cli.engine.training.trackers import open_tracker


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

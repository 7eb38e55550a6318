"""The stock scheduler's settings for a few-step schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from rtdmd_cli.engine.export.schedule import agrees, stock_config


def config(**values: Any) -> dict[str, Any]:
    """As a published scheduler_config.json holds it, SD3's and Z-Image's: no keys but those that its author set."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": "0.29.0.dev0",
        "num_train_timesteps": 1000,
        **values,
    }


def sigmas(raw: list[int], base: dict[str, Any]) -> list[float]:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(base)
    scheduler.set_timesteps(sigmas=[step / 1000 for step in raw])
    found: list[float] = scheduler.sigmas.tolist()
    return found


@pytest.mark.parametrize(
    ("raw", "shift"),
    [
        ([1000, 750, 500, 250], 3.0),
        ([1000, 750, 500, 250], 1.0),
        ([1000, 900, 800, 700, 600], 3.0),
        ([1000, 500], 3.0),
        ([1000], 3.0),
        ([1000, 875, 750, 625, 500, 375, 250, 125], 5.0),
    ],
)
def test_evenly_spaced_steps_are_taken_exactly(raw: list[int], shift: float) -> None:
    base = config(shift=shift)
    wanted = sigmas(raw, base)
    found = stock_config(base, wanted)
    assert found is not None
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(found)
    scheduler.set_timesteps(len(raw))
    assert scheduler.sigmas.tolist() == pytest.approx(wanted, abs=2e-6)
    assert {key for key in base if base[key] != found[key]} <= {"shift", "shift_terminal"}


@pytest.mark.parametrize("more", [{}, {"use_dynamic_shifting": False}], ids=["sd3", "zimage"])
def test_the_published_schedule(more: dict[str, Any]) -> None:
    found = stock_config(config(shift=3.0, **more), [1.0, 0.9, 0.75, 0.5, 0.0])
    assert found is not None
    assert found["shift"] == pytest.approx(2.0, abs=0.01) and found["shift_terminal"] == 0.5


def test_a_file_with_all_keys_of_today(tmp_path: Path) -> None:
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_config(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    wanted = sigmas([1000, 750, 500, 250], saved)
    found = stock_config(saved, wanted)
    assert found is not None and found.keys() == saved.keys() and agrees(found, wanted)
    assert found == stock_config(config(shift=3.0), wanted) | {"_diffusers_version": diffusers.__version__}


def test_uneven_steps_have_no_setting() -> None:
    base = config(shift=3.0)
    for raw in ([1000, 900, 500, 250], [1000, 300, 200, 100]):
        wanted = sigmas(raw, base)
        assert not agrees(base, wanted) and stock_config(base, wanted) is None


def test_a_shift_by_resolution_is_left_alone() -> None:
    assert stock_config(config(use_dynamic_shifting=True), [1.0, 0.5, 0.0]) is None

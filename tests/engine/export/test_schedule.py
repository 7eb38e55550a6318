"""The stock scheduler's settings for a few-step schedule."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from rtdmd_cli.engine.export.schedule import agrees, stock_config


def config(**changes: Any) -> dict[str, Any]:
    return dict(FlowMatchEulerDiscreteScheduler(**changes).config)


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


def test_the_published_schedule() -> None:
    found = stock_config(config(shift=3.0), [1.0, 0.9, 0.75, 0.5, 0.0])
    assert found is not None
    assert found["shift"] == pytest.approx(2.0, abs=0.01) and found["shift_terminal"] == 0.5


def test_uneven_steps_have_no_setting() -> None:
    base = config(shift=3.0)
    for raw in ([1000, 900, 500, 250], [1000, 300, 200, 100]):
        wanted = sigmas(raw, base)
        assert not agrees(base, wanted) and stock_config(base, wanted) is None


def test_a_shift_by_resolution_is_left_alone() -> None:
    assert stock_config(config(use_dynamic_shifting=True), [1.0, 0.5, 0.0]) is None

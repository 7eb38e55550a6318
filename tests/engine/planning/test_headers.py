"""What the presets for one card say in their headers, against the plan."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rtdmd_cli.config.loader import list_presets, load_preset, preset_text
from rtdmd_cli.config.planned import GPU, planned
from rtdmd_cli.engine.planning.gpus import UTILISATION, find_gpu
from rtdmd_cli.engine.planning.plan import STAGES, Plan, plan_stage
from scripts.plan_headers import figures

PRESETS = {info.name: info for info in list_presets() if not info.name.startswith("shapes-")}
ONE_CARD = [name for name in PRESETS if name.endswith(("-24gb", "-16gb", "-overnight"))]
README = Path(__file__).parents[3] / "README.md"
COUNTED = "sd3-4step-overnight"
"""Counted anew in every test run; `python -m scripts.plan_headers` counts the others."""
NIGHT = 10.0


def cell(name: str) -> str:
    """What the README's table says of a preset."""
    figures = PRESETS[name].planned if name in PRESETS else None
    return f"{figures.peak:.1f} GiB, {sum(figures.hours):,.0f} h" if figures else "-"


def test_every_preset_is_planned_and_stands_in_the_readme() -> None:
    assert all(info.planned for info in PRESETS.values())
    rows = [line for line in README.read_text("utf-8").splitlines() if line.startswith("| `")]
    for name in {name.partition("-4step")[0] + "-4step" for name in PRESETS}:
        cells = " | ".join(cell(name + variant) for variant in ("", "-24gb", "-overnight"))
        assert any(row.startswith(f"| `{name}` |") and row.endswith(f"| {cells} |") for row in rows), (
            name,
            cells,
        )


@pytest.mark.parametrize("name", ONE_CARD)
def test_a_preset_for_one_card_fits_it_by_its_header(name: str) -> None:
    found = planned(preset_text(name))
    assert found, name
    card = float(match[1]) if (match := re.search(r"-(\d+)gb$", name)) else 24.0
    assert found.fits(card)
    if name.endswith("-overnight"):
        assert sum(found.hours) <= NIGHT


def test_a_header_is_the_plan() -> None:
    told = planned(preset_text(COUNTED))
    assert told
    preset = load_preset(COUNTED, [], {}).preset
    stages = tuple(plan_stage(preset, stage) for stage in STAGES)
    counted = figures(Plan(preset, stages, find_gpu(GPU).tflops * 1e12 * UTILISATION))
    assert told.decides == counted.decides
    assert (*told.card, told.host) == pytest.approx((*counted.card, counted.host), abs=0.06)
    assert (told.disk, *told.hours) == pytest.approx((counted.disk, *counted.hours), rel=0.01, abs=0.51)
    assert planned(told.lines()) == told

"""What a training says of its model before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from rtdmd_cli.config.schema import Preset
from rtdmd_cli.engine.training.assembly import model_line
from tests.tiny_flux import build_flux1_pipeline, load_tiny, save, tiny_config


@pytest.mark.parametrize(("embeds", "guidance"), [(False, 3.5), (False, 1.0), (True, 3.5)])
def test_guidance_without_an_input_for_it_is_said(tmp_path: Path, embeds: bool, guidance: float) -> None:
    """A base like FLUX.1-schnell: `guidance` is classifier-free there, which costs a second evaluation."""
    path = save(build_flux1_pipeline(guidance_embeds=embeds), tmp_path / "base")
    config = tiny_config("flux1", path=path, guidance=guidance)
    line = model_line(Preset(name="p", model=config), load_tiny("flux1", path=path, guidance=guidance))
    told = "model.guidance 3.5 is classifier-free here, two evaluations a step" in line
    assert told is (not embeds and guidance != 1)

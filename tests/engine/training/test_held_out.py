"""What is measured with a sample grid of other models than the built-in one: CLIP score and distance to the teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rtdmd_cli.engine.training.held_out import CLIP, DISTANCE, ClipFigures, open_clip
from tests.tiny_clip import pictures, save_clip
from tests.tiny_tuning import CPU, make_tuner


def test_the_clip_figures_of_a_grid(tmp_path: Path) -> None:
    """Against cosines computed here; the teacher's own pictures are at distance 0."""
    source, core = str(save_clip(tmp_path)), make_tuner().core
    clip, images, others = open_clip(source, CPU), pictures(3, 32, 32), pictures(3, 40, 40)
    with torch.no_grad():
        texts, teacher = clip.text_features(["a red ring", "a star", "two"]), clip.image_features(images)
        features = clip.image_features(others)
    judge = ClipFigures(source, CPU, texts, teacher)
    assert judge.measure(core, images)[DISTANCE] == pytest.approx(0, abs=1e-5)
    found = judge.measure(core, others)
    cosine = torch.nn.functional.cosine_similarity
    assert found[CLIP] == pytest.approx(float(cosine(features, texts).mean()), abs=1e-5)
    assert found[DISTANCE] == pytest.approx(float(1 - cosine(features, teacher).mean()), abs=1e-5)
    assert found.keys() == {CLIP, DISTANCE} and found[DISTANCE] > 0.01

"""The rewards of the shapes world: right for rendered pictures, wrong for others, whatever the order of the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rtdmd_cli.engine.evaluation.shapes import judge_pictures
from rtdmd_cli.engine.judges.geneval_soft import soft_score
from rtdmd_cli.engine.rewards import shapes
from rtdmd_cli.engine.rewards.registry import find_reward
from rtdmd_cli.engine.rewards.shapes import ShapesGenEval
from rtdmd_cli.errors import DataError
from rtdmd_cli.shapes.detector import detect
from rtdmd_cli.shapes.grammar import Caption, parse, requirement, scene_for
from rtdmd_cli.shapes.prompts import benchmark
from rtdmd_cli.shapes.render import render

CPU = torch.device("cpu")
CAPTIONS = benchmark()[::14]  # 40 of all six tasks
PROMPTS = [caption.text for caption in CAPTIONS]
NONE: list[dict[str, Any]] = [{}] * len(CAPTIONS)


def rendered(captions: list[Caption] | tuple[Caption, ...]) -> Tensor:
    scenes = [scene_for(caption, np.random.default_rng(row)) for row, caption in enumerate(captions)]
    return torch.from_numpy(np.stack([render(scene) for scene in scenes])).clamp(0, 1)


def load(soft: bool) -> ShapesGenEval:
    return ShapesGenEval.load(CPU, None, soft)


@pytest.mark.parametrize("soft", [False, True])
def test_rendered_captions_get_full_marks(soft: bool) -> None:
    scores = load(soft).score(rendered(CAPTIONS), PROMPTS, NONE)
    assert scores.dtype == torch.float32 and scores.tolist() == [1.0] * len(CAPTIONS)


def test_scores_are_those_of_the_benchmarks_judge() -> None:
    """Every second picture is that of another caption."""
    images = rendered(CAPTIONS)
    images[::2] = images[1::2].clone()
    strict, soft = (load(mode).score(images, PROMPTS, NONE) for mode in (False, True))
    verdicts = judge_pictures(images.numpy(), CAPTIONS)
    assert strict.tolist() == [float(verdict.correct) for verdict in verdicts]
    assert strict[1::2].all() and strict[::2].mean() < 0.5
    for image, caption, score in zip(images.numpy(), CAPTIONS, soft.tolist(), strict=True):
        (found,) = detect(image[None], 0.9 if caption.task == "counting" else 0.3)
        assert score == pytest.approx(soft_score(found, requirement(caption)))
    assert strict[::2].mean() < soft[::2].mean() < 1  # partial credit


def test_metadata_goes_before_the_prompt() -> None:
    images = rendered([parse("a photo of a red circle")])
    red = requirement(parse("a photo of a red circle"))
    assert load(False).score(images, ["something else"], [red]).item() == 1
    assert (
        load(False)
        .score(images, ["a photo of a red circle"], [requirement(parse("a photo of a ring"))])
        .item()
        == 0
    )


def test_the_detector_is_called_once_for_each_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, float]] = []

    def counted(pictures: Any, threshold: float) -> Any:
        calls.append((len(pictures), threshold))
        return detect(pictures, threshold)

    monkeypatch.setattr(shapes, "detect", counted)
    scores = load(False).score(rendered(CAPTIONS), PROMPTS, NONE)
    counting = sum(caption.task == "counting" for caption in CAPTIONS)
    assert sorted(calls) == sorted([(counting, 0.9), (len(CAPTIONS) - counting, 0.3)])
    assert scores.sum() == len(CAPTIONS)


def test_bad_prompts_pictures_and_metadata() -> None:
    images = rendered(CAPTIONS[:1])
    with pytest.raises(
        DataError, match="'a red dog' is no caption of the shapes world: .*a photo of"
    ) as caught:
        load(False).score(images, ["a red dog"], [{}])
    assert "a photo of a red circle" in caught.value.hint
    with pytest.raises(DataError, match=r"requirement of 'x': `include\[0\].count`"):
        load(False).score(images, ["x"], [{"include": [{"class": "ring"}]}])
    with pytest.raises(DataError, match="32 px, not 64 x 48"):
        load(False).score(torch.zeros(1, 3, 48, 64), PROMPTS[:1], [{}])
    with pytest.raises(ValueError, match="1 images for 2 prompts"):
        load(False).score(images, PROMPTS[:2], [{}])
    with pytest.raises(DataError, match="no weights"):
        ShapesGenEval.load(CPU, "somewhere")


@pytest.mark.parametrize(("name", "soft"), [("shapes-geneval", False), ("shapes-geneval-soft", True)])
def test_the_rows(name: str, soft: bool) -> None:
    entry = find_reward(name)
    reward = entry.load(CPU, None)
    assert isinstance(reward, ShapesGenEval) and reward.soft == soft
    assert (entry.metadata, entry.differentiable, entry.needs) == ("", False, ())

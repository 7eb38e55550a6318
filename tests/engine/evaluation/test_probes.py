"""The bundled pictures: in range, unlike each other, and ranked right by what can be run here."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rtdmd_cli.engine.evaluation import probes
from rtdmd_cli.engine.evaluation.probes import Pair, pairs_for
from rtdmd_cli.engine.judges.detector import CLASSES
from rtdmd_cli.engine.judges.features import ClipScorer
from rtdmd_cli.engine.judges.requirements import read_requirement
from rtdmd_cli.engine.rewards.ocr import OcrReward
from rtdmd_cli.engine.rewards.registry import REWARDS
from rtdmd_cli.shapes.grammar import TASKS, parse

ALL: list[Callable[[], list[Pair]]] = [
    probes.captions,
    probes.looks,
    probes.texts,
    probes.shapes,
    probes.objects,
]


@pytest.mark.parametrize("make", ALL)
def test_pictures(make: Callable[[], list[Pair]]) -> None:
    for pair in make():
        for image in (pair.better, pair.worse):
            assert image.dtype == torch.float32 and image.ndim == 3 and image.shape[0] == 3
            assert image.shape == make()[0].better.shape and image.shape[1] == image.shape[2]
            assert image.min() >= 0 and image.max() <= 1
        assert (pair.better - pair.worse).abs().mean() > 0.02


def test_pictures_are_the_same_each_time() -> None:
    first = [(pair.better.clone(), pair.worse.clone()) for make in ALL for pair in make()]
    for make in ALL:
        make.cache_clear()  # type: ignore[attr-defined]
    for (better, worse), pair in zip(first, (pair for make in ALL for pair in make()), strict=True):
        assert torch.equal(better, pair.better) and torch.equal(worse, pair.worse)


def test_rewards_of_the_table_get_their_pairs() -> None:
    assert pairs_for("ocr") is probes.texts() and pairs_for("shapes-geneval") is probes.shapes()
    assert pairs_for("pickscore") is pairs_for("my:Own") is probes.captions()
    for name in ("geneval", "geneval-soft"):
        assert pairs_for(name) is probes.objects() and REWARDS[name].metadata == "include"


def colour(image: Tensor) -> list[float]:
    """Of the middle of the picture."""
    values: list[float] = image[:, 192, 192].tolist()
    return values


def test_captions_show_what_they_say() -> None:
    red, blue, yellow, green, last = probes.captions()
    for pair, expected in ((red, "100"), (blue, "001"), (yellow, "110"), (green, "010"), (last, "100")):
        assert "".join(str(int(value > 0.55)) for value in colour(pair.better)) == expected
    assert [pair.prompt.split()[-2] for pair in probes.captions()] == [
        "red",
        "blue",
        "yellow",
        "green",
        "red",
    ]
    assert all(len(pair.metadata["vqa_list"]) == 2 for pair in probes.captions())


def test_shapes_cover_the_tasks_and_are_ranked_right_by_both_clips() -> None:
    pairs = probes.shapes()
    assert {parse(pair.prompt).task for pair in pairs} == set(TASKS)
    for name in ("clip", "clip-judge"):
        clip = ClipScorer.load(Path(str(files("rtdmd_cli"))) / "shapes/weights" / name, "cpu")
        prompts = [pair.prompt for pair in pairs]
        better, worse = (
            clip.score(torch.stack(images), prompts)
            for images in ([p.better for p in pairs], [p.worse for p in pairs])
        )
        assert (better - worse).min() > 0.2


def test_signs_can_be_read() -> None:
    reward = OcrReward.load(torch.device("cpu"), None)
    assert [reward.read(pair.better) for pair in probes.texts()] == ["OPEN", "Hello", "OPEN"]
    assert reward.read(probes.objects()[0].better) == "STOP"


def test_objects_have_requirements_that_the_detector_knows() -> None:
    for pair in probes.objects():
        (clause,) = read_requirement(pair.prompt, pair.metadata)["include"]
        assert clause["class"] in CLASSES and clause["class"] in pair.prompt

"""The GenEval rewards on random models: which detections are judged by which rule, and what bad metadata says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rtdmd_cli.engine.judges import detector
from rtdmd_cli.engine.judges.colours import COLOURS
from rtdmd_cli.engine.judges.detector import CLASSES
from rtdmd_cli.engine.rewards.geneval import GenEval
from rtdmd_cli.engine.rewards.registry import find_reward
from rtdmd_cli.errors import DataError, EnvironmentFailure
from tests.tiny_geneval import LIKELY, save_clip, save_detector

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("geneval")
    save_detector(folder / "detector")
    save_clip(folder / "clip")
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less work for the network: 96 px in place of 800; and lower thresholds, as its scores are low."""
    monkeypatch.setattr(detector, "SHORT", 96)
    monkeypatch.setattr(detector, "THRESHOLD", 0.15)
    monkeypatch.setattr(detector, "COUNTING_THRESHOLD", 0.35)


def pictures(count: int) -> Tensor:
    rough = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.interpolate(rough, (64, 64), mode="bilinear")


@pytest.fixture(scope="module")
def reward(folder: Path) -> GenEval:
    return GenEval.load(CPU, str(folder))


@pytest.fixture(scope="module")
def soft(folder: Path) -> GenEval:
    return GenEval.load(CPU, str(folder), soft=True)


def line(label: str, count: int, tag: str = "single_object", **more: Any) -> dict[str, Any]:
    return {"tag": tag, "include": [{"class": label, "count": count, **more}], "prompt": "..."}


def counts(reward: GenEval, images: Tensor, threshold: float) -> list[dict[str, int]]:
    """Label -> number of objects above the threshold of each picture, by the detector alone."""
    found = reward.objects.detect((images * 255).round() / 255, [threshold] * len(images))
    labels = [[each.detection.label for each in row] for row in found]
    return [{label: row.count(label) for label in row} for row in labels]


def test_strict_and_soft_scores_of_counts(reward: GenEval, soft: GenEval) -> None:
    images = pictures(6)
    usual, strictly = (counts(reward, images, threshold) for threshold in (0.15, 0.35))
    assert usual != strictly
    for tag, seen in (("single_object", usual), ("counting", strictly)):
        for label in LIKELY.values():
            found = [row.get(label, 0) for row in seen]
            metadata = [line(label, 2, tag)] * 6
            strict = reward.score(images, ["?"] * 6, metadata)
            assert strict.tolist() == [float(n >= 2) for n in found]
            partial = soft.score(images, ["?"] * 6, metadata)
            assert partial.tolist() == pytest.approx([1 - abs(2 - n) / 2 for n in found])
            assert strict.dtype == partial.dtype == torch.float32 and strict.shape == (6,)


def test_each_picture_is_judged_by_its_own_line(reward: GenEval) -> None:
    images, labels = pictures(4), list(LIKELY.values())
    tags = ["counting", "colors", "counting", "colors"]
    seen = [counts(reward, images, limit) for limit in (0.35, 0.15, 0.35, 0.15)]
    metadata = [line(label, 1, tag) for label, tag in zip(labels, tags, strict=True)]
    scores = reward.score(images, ["?"] * 4, metadata)
    assert scores.tolist() == [float(seen[i][i].get(labels[i], 0) >= 1) for i in range(4)]


def test_colours_are_told_for_the_classes_that_ask_for_one(reward: GenEval) -> None:
    images, asked = pictures(5), ["banana", "apple"]
    requirement = {
        "include": [{"class": asked[0], "count": 1, "color": "red"}, {"class": asked[1], "count": 1}]
    }
    rows = reward.detect(images, [requirement] * 5)
    colours = {label: [d.color for row in rows for d in row if d.label == label] for label in CLASSES}
    assert colours["banana"] and set(colours.pop("banana")) <= set(COLOURS)
    assert {colour for found in colours.values() for colour in found} == {None}


def test_a_colour_scores(reward: GenEval, soft: GenEval) -> None:
    """Of a single object the colour that was told scores 1, another one 0, or half with partial credit."""
    images, judged = pictures(10), 0
    ask = {"include": [{"class": label, "count": 1, "color": "red"} for label in LIKELY.values()]}
    for image, found in zip(images, reward.detect(images, [ask] * 10), strict=True):
        labels = [d.label for d in found]
        for told in (d for d in found if d.label in LIKELY.values() and labels.count(d.label) == 1):
            metadata = [line(told.label, 1, "colors", color=colour) for colour in COLOURS]
            batch = image.expand(len(COLOURS), -1, -1, -1)
            right = torch.tensor([colour == told.color for colour in COLOURS])
            assert torch.equal(reward.score(batch, ["?"] * 10, metadata), right.float())
            assert torch.equal(soft.score(batch, ["?"] * 10, metadata), 0.5 + 0.5 * right)
            judged += 1
        if judged > 2:
            break
    assert judged > 2


def test_a_picture_and_its_png_are_judged_alike(reward: GenEval) -> None:
    images = pictures(2)
    rounded = (images * 255).round() / 255
    ask = [line("banana", 1, color="red")] * 2
    assert not torch.equal(images, rounded)
    assert reward.detect(images.requires_grad_(), ask) == reward.detect(rounded, ask)
    beyond = (rounded - 0.5) * 3 + 0.5
    assert reward.detect(beyond, ask) == reward.detect(beyond.clamp(0, 1), ask)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "needs the metadata `include` of each prompt; 'a dog' has none"),
        ({"include": "cow"}, "the requirement of 'a dog': `include` must be a list"),
        ({"include": [{"class": "dog", "count": 1, "colour": "red"}]}, r"`include\[0\].colour` is unknown"),
        (line("dragon", 1), "'a dog' names 'dragon'"),
        (line("dog", 1, color="grey"), "'a dog' names 'grey'"),
        (line("dog", 1) | {"exclude": [{"class": "unicorn", "count": 1}]}, "names 'unicorn'"),
    ],
)
def test_bad_metadata_names_prompt_and_key(reward: GenEval, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        reward.score(pictures(1), ["a dog"], [metadata])
    assert caught.value.hint or "must be" in message


def test_unlike_numbers_and_pictures_that_are_none(reward: GenEval) -> None:
    with pytest.raises(ValueError, match="2 images for 1 prompts"):
        reward.score(pictures(2), ["a"], [line("dog", 1)])
    with pytest.raises(ValueError, match="float images"):
        reward.score(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"], [line("dog", 1)])


@pytest.mark.parametrize("name", ["detector", "clip"])
def test_a_folder_without_its_parts(tmp_path: Path, name: str) -> None:
    (tmp_path / ({"detector", "clip"} - {name}).pop()).mkdir()
    with pytest.raises(DataError, match=f"no folder `{name}`"):
        GenEval.load(CPU, str(tmp_path))


def test_the_default_source_is_named_where_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFailure, match="facebook/mask2former-swin-small-coco-instance"):
        GenEval.load(CPU, None)


@pytest.mark.parametrize(("name", "soft"), [("geneval", False), ("geneval-soft", True)])
def test_the_rows(folder: Path, name: str, soft: bool) -> None:
    entry = find_reward(name)
    reward = entry.load(CPU, str(folder))
    assert isinstance(reward, GenEval) and reward.soft == soft
    assert (entry.metadata, entry.differentiable, reward.differentiable) == ("include", False, False)
    assert [need.source for need in entry.needs] == [detector.MODEL, "openai/clip-vit-large-patch14"]

"""The OCR reward reads text drawn with PIL, and scores it by Flow-GRPO's rule."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rtdmd_cli.engine.rewards.ocr import OcrReward, edit_distance, text_score, wanted_text
from rtdmd_cli.engine.rewards.registry import find_reward
from rtdmd_cli.errors import DataError, EnvironmentFailure

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reward() -> OcrReward:
    return OcrReward.load(CPU, None)


def drawn(*lines: str, size: int = 256, ink: str = "#102080", paper: str = "#f0e8d0") -> Tensor:
    """Text on a plain ground: [3,size,size] in 0..1."""
    picture = Image.new("RGB", (size, size), paper)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=36)
    for number, line in enumerate(lines):
        pen.text((16, 50 + 60 * number), line, ink, font)
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return data.view(size, size, 3).permute(2, 0, 1).float() / 255


def test_drawn_text_is_read(reward: OcrReward) -> None:
    assert reward.read(drawn("Open Daily")).replace(" ", "") == "OpenDaily"
    assert reward.read(drawn("HELLO", "WORLD")) == "HELLOWORLD"  # from the top
    assert reward.read(drawn()) == ""


def test_scores_of_drawn_text(reward: OcrReward) -> None:
    images = torch.stack([drawn("Open Daily"), drawn("Closed"), drawn(), drawn("It is", "Open Daily")])
    prompts = ['a shop sign that says "open daily"'] * 4
    scores = reward.score(images, prompts, [{}] * 4)
    assert scores.dtype == torch.float32
    # "closed" -> "opendaily": 8 edits of 9 characters at most; found anywhere counts fully
    assert scores.tolist() == pytest.approx([1, 1 - levenshtein("closed", "opendaily") / 9, 0, 1])


def test_metadata_goes_before_the_prompt(reward: OcrReward) -> None:
    images = torch.stack([drawn("Yes", ink="#ff2020", paper="#2020ff")] * 2)
    assert reward.score(images, ['"no"', "anything"], [{"text": "Yes"}] * 2).tolist() == [1.0, 1.0]


def test_the_engine_gets_8_bit_bgr(reward: OcrReward) -> None:
    seen: list[Any] = []

    def engine(array: Any) -> SimpleNamespace:
        seen.append(array)
        return SimpleNamespace(txts=("one", "two"))

    spied: Any = dataclasses.replace(reward, engine=engine)
    image = torch.tensor([1.0, 0.2, 1.7])[:, None, None].expand(3, 4, 6)
    assert spied.read(image) == "onetwo"
    assert (
        seen[0].shape == (4, 6, 3) and seen[0].dtype == "uint8" and seen[0][0, 0].tolist() == [255, 51, 255]
    )
    assert spied.read(image.flip(0) * torch.tensor([0.0, 1.0, 1.0])[:, None, None]) == "onetwo"
    assert seen[1][0, 0].tolist() == [255, 51, 0]


@functools.cache
def levenshtein(a: str, b: str) -> int:
    """By its recursive definition."""
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return levenshtein(a[1:], b[1:])
    return 1 + min(levenshtein(a[1:], b), levenshtein(a, b[1:]), levenshtein(a[1:], b[1:]))


WORDS = st.text("abc", max_size=7)


@given(WORDS, WORDS)
def test_edit_distance(a: str, b: str) -> None:
    assert edit_distance(a, b) == levenshtein(a, b)


@pytest.mark.parametrize(
    ("read", "score"),
    [
        ("Hello World", 1.0),
        ("HELLO\nworld", 1.0),
        ("say helloworld now!", 1.0),
        ("hell0world", 0.9),
        ("helloworl", 0.9),
        ("", 0.0),
        ("zzzzzzzzzzzzzzzzzzzzzzzzzz", 0.0),  # capped: 26 edits of 10
    ],
)
def test_the_published_rule(read: str, score: float) -> None:
    assert text_score(read, "Hello World") == pytest.approx(score)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign "Open" and a sign "Shut"', "Open"),
        ("a sign that says 'Open'", "Open"),
        ("it's a sign, it says 'Don't stop' in red", "Don't stop"),
        ("a sign that says \u201cOpen\u201d", "Open"),
        ("""a poster 'here' "there" """, "there"),
    ],
)
def test_the_text_of_a_prompt(prompt: str, text: str) -> None:
    assert wanted_text(prompt, {}) == text


@pytest.mark.parametrize("prompt", ["a dog", 'a sign " "', "it's Tom's dog", '""', "x" * 300])
def test_a_prompt_without_text_is_named(prompt: str) -> None:
    with pytest.raises(DataError, match="names no text to be read") as caught:
        wanted_text(prompt, {})
    assert prompt[:60] in caught.value.message and len(caught.value.message) < 150


def test_bad_metadata(reward: OcrReward) -> None:
    for known in ({"text": 3}, {"text": "  "}):
        with pytest.raises(DataError, match="'a dog'"):
            reward.score(drawn()[None], ["a dog"], [known])


def test_every_published_prompt_names_a_text() -> None:
    parents = Path(__file__).resolve().parents
    paths = [parent / "shared/data/benchmarks/ocr.txt" for parent in parents]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        pytest.skip("the prompts are not on this machine")
    prompts = path.read_text("utf-8").splitlines()
    assert len(prompts) == 1018
    assert [wanted_text(prompt, {}) for prompt in prompts] == [prompt.split('"')[1] for prompt in prompts]


def test_the_missing_package_and_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = find_reward("ocr")
    assert (entry.extra, entry.differentiable, entry.metadata) == ("ocr", False, "")
    with pytest.raises(DataError, match="nothing is loaded from x"):
        entry.load(CPU, "x")
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(EnvironmentFailure, match="rapidocr") as caught:
        entry.load(CPU, None)
    assert caught.value.hint == "pip install 'rtdmd[ocr]'"

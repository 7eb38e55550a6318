"""GenEval2's score without its judge."""

import math
from typing import Any

import pytest
import torch

from rtdmd_cli.engine.judges.soft_tifa import geometric_mean, question, read_atoms, spellings
from rtdmd_cli.errors import DataError


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", {"Yes", "yes", " Yes", " yes"}),
        ("two", {"two", "Two", " two", " Two", "2", " 2"}),
        ("seven", {"seven", "Seven", " seven", " Seven", "7", " 7"}),
        ("eleven", {"eleven", "Eleven", " eleven", " Eleven"}),
    ],
)
def test_spellings_are_the_published_ones(answer: str, expected: set[str]) -> None:
    found = spellings(answer)
    assert set(found) == expected and len(found) == len(expected)


def test_question() -> None:
    assert (
        question("How many pigs are in the image?") == "How many pigs are in the image? Answer in one word."
    )


def test_geometric_mean() -> None:
    scores = torch.tensor([0.9, 0.5, 1e-30])
    assert geometric_mean(scores).item() == pytest.approx((0.9 * 0.5 * 1e-30) ** (1 / 3), rel=1e-5)
    assert geometric_mean(torch.tensor([0.25])).item() == pytest.approx(0.25)
    assert geometric_mean(torch.tensor([0.9, 0.0])).item() == 0.0
    many = torch.full((40,), 1e-3)  # their product is below the smallest float32
    assert math.isclose(geometric_mean(many).item(), 1e-3, rel_tol=1e-5)


def test_atoms_of_a_published_line() -> None:
    line = {
        "prompt": "two metal toys",
        "atom_count": 3,
        "vqa_list": [["How many toys are in the image?", "two"], ["Are the toys metal?", "Yes"]],
        "skills": ["count", "attribute"],
    }
    assert read_atoms(line, "two metal toys") == [
        ("How many toys are in the image?", "two"),
        ("Are the toys metal?", "Yes"),
    ]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "two toys` has no `vqa_list`"),
        ({"vqa_lists": []}, "has no `vqa_list`"),
        ({"vqa_list": []}, "`vqa_list` of the prompt `two toys` is no list"),
        ({"vqa_list": "Are there toys?"}, "is no list"),
        ({"vqa_list": [["Are there toys?", "Yes"], ["How many?"]]}, r"`vqa_list\[1\]`"),
        ({"vqa_list": [["How many?", 2]]}, r"`vqa_list\[0\]`"),
        ({"vqa_list": [["How many?", ""]]}, r"`vqa_list\[0\]`"),
    ],
)
def test_atoms_that_are_missing_or_wrong(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_atoms(metadata, "two toys")
    assert caught.value.hint

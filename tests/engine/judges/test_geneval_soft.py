"""The partial-credit score: every term by hand, and its relation to the strict judge."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtdmd_cli.engine.judges.geneval import RELATIONS, Detection, judge
from rtdmd_cli.engine.judges.geneval_soft import soft_score


def at(label: str, x: float, y: float = 0, color: str | None = None, score: float = 0.9) -> Detection:
    """A square of 10 px with centre (x, y)."""
    return Detection(label, (x - 5, y - 5, x + 5, y + 5), score, color)


def row(label: str, number: int, color: str | None = None) -> list[Detection]:
    return [at(label, 20 * i, color=color) for i in range(number)]


def include(*clauses: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"include": [{"count": 1, **clause} for clause in clauses], **more}


@pytest.mark.parametrize(("found", "score"), [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (4, 2 / 3), (9, -1)])
def test_count(found: int, score: float) -> None:
    assert soft_score(row("cow", found), include({"class": "cow", "count": 3})) == pytest.approx(score)


@pytest.mark.parametrize("more", [{"color": "red"}, {"position": ["left of", 0]}])
def test_a_wrong_count_loses_the_term_of_colour_or_position(more: dict[str, Any]) -> None:
    requirement = include({"class": "cup"}, {"class": "cow", "count": 2, **more})
    scene = [at("cup", 300), at("cow", 0, color="red")]
    assert soft_score(scene, requirement) == pytest.approx((1 + 1 / 2 + 0) / 3)


def test_a_wrong_count_of_a_clause_with_colour_and_position_gives_one_zero() -> None:
    requirement = include({"class": "cup"}, {"class": "cow", "color": "red", "position": ["above", 0]})
    assert soft_score([at("cup", 0)], requirement) == pytest.approx((1 + 0 + 0) / 3)


@pytest.mark.parametrize(("red", "score"), [(0, (1 + 0) / 2), (1, (1 + 1 / 3) / 2), (3, 1)])
def test_colour(red: int, score: float) -> None:
    scene = row("cow", red, "red") + row("cow", 3 - red, "blue")
    requirement = include({"class": "cow", "count": 3, "color": "red"})
    assert soft_score(scene, requirement) == pytest.approx(score)


@pytest.mark.parametrize(("x", "score"), [(-50, (1 + 1 + 1) / 3), (50, (1 + 1 + 0 + 1) / 4)])
def test_position(x: float, score: float) -> None:
    """A violated relation costs a 0 beside the 1."""
    requirement = include({"class": "cow"}, {"class": "cup", "position": ["left of", 0]})
    assert soft_score([at("cow", 0), at("cup", x)], requirement) == pytest.approx(score)


def test_position_of_several_objects() -> None:
    """Two of three cups are on the wrong side of some cow: two zeros, then the one."""
    requirement = include(
        {"class": "cow", "count": 2}, {"class": "cup", "count": 3, "position": ["left of", 0]}
    )
    scene = [at("cow", 0), at("cow", 100), at("cup", -50), at("cup", 50), at("cup", 150)]
    assert soft_score(scene, requirement) == pytest.approx((1 + 1 + 0 + 0 + 1) / 5)


def test_position_counts_only_where_the_colour_matched() -> None:
    requirement = include({"class": "cow"}, {"class": "cup", "color": "red", "position": ["left of", 0]})
    assert soft_score([at("cow", 0), at("cup", 50, color="blue")], requirement) == pytest.approx(2 / 3)
    assert soft_score([at("cow", 0), at("cup", 50, color="red")], requirement) == pytest.approx(4 / 5)


@pytest.mark.parametrize(
    ("first", "terms"),
    [({"count": 2}, [1 / 2]), ({"color": "red"}, [1, 0]), ({"count": 1}, [1])],
    ids=["too few", "wrong colour", "holds"],
)
def test_a_clause_that_fails_is_a_missing_target(first: dict[str, Any], terms: list[float]) -> None:
    requirement = include({"class": "cow", **first}, {"class": "cup", "position": ["left of", 0]})
    scene = [at("cow", 50, color="blue"), at("cup", 0)]
    terms = [*terms, 1, 1 if first == {"count": 1} else 0]
    assert soft_score(scene, requirement) == pytest.approx(sum(terms) / len(terms))


def test_a_violated_position_is_a_missing_target() -> None:
    requirement = include(
        {"class": "cow"},
        {"class": "cup", "position": ["left of", 0]},
        {"class": "dog", "position": ["left of", 1]},
    )
    scene = [at("cow", 0), at("cup", 40), at("dog", -90)]
    assert soft_score(scene, requirement) == pytest.approx((1 + (1 + 0 + 1) + (1 + 0)) / 6)


def test_exclude_is_ignored_and_nothing_asked_gives_nothing() -> None:
    excluded = {"exclude": [{"class": "cow", "count": 2}]}
    assert soft_score(row("cow", 2), include({"class": "cow", "count": 2}, **excluded)) == 1
    assert soft_score(row("cow", 1), excluded) == 0


def test_all_detections_count_not_only_the_most_confident() -> None:
    red, blue = at("cow", 0, color="red", score=0.9), at("cow", 50, color="blue", score=0.4)
    requirement = include({"class": "cow", "color": "red"})
    assert judge([red, blue], requirement).correct
    assert soft_score([red, blue], requirement) == 0


@given(st.integers(0, 3), st.integers(0, 3), st.sampled_from(RELATIONS), st.integers(-60, 60))
def test_full_marks_only_for_a_correct_picture(cows: int, red: int, relation: str, x: int) -> None:
    """With the right count, 1 means correct, and less than 1 that something failed."""
    requirement = include(
        {"class": "cow", "count": 2}, {"class": "cup", "color": "red", "position": [relation, 0]}
    )
    scene = [*row("cow", cows), *(at("cup", x, 9 * i - 40, color="red") for i in range(red))]
    correct, score = judge(scene, requirement).correct, soft_score(scene, requirement)
    assert score <= 1
    assert not (score == 1 and not correct)
    if cows == 2 and red == 1:
        assert (score == 1) == correct

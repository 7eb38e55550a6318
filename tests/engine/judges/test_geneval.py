"""The GenEval judge: hand-made cases for every clause, properties, and the published requirements."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtdmd_cli.engine.judges.geneval import (
    RELATIONS,
    TASKS,
    Detection,
    check_requirement,
    judge,
    relative_position,
    task_scores,
)
from rtdmd_cli.errors import DataError

BENCHMARK = "geneval.jsonl"


def at(
    label: str, x: float, y: float, score: float = 0.9, color: str | None = None, size: float = 10
) -> Detection:
    """A square object with centre (x, y)."""
    half = size / 2
    return Detection(label, (x - half, y - half, x + half, y + half), score, color)


def include(*clauses: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"include": [{"count": 1, **clause} for clause in clauses], **more}


def test_count_at_least() -> None:
    requirement = include({"class": "cow", "count": 2})
    verdict = judge([at("cow", 0, 0), at("cup", 50, 0)], requirement)
    assert not verdict.correct
    assert verdict.reasons == ["expected 2 cow, found 1"]
    for n in (2, 3):
        assert judge([at("cow", 20 * i, 0) for i in range(n)], requirement).correct


def test_all_clauses_are_needed_and_each_failure_is_named() -> None:
    requirement = include({"class": "cow"}, {"class": "cup"}, exclude=[{"class": "dog", "count": 1}])
    assert judge([at("cow", 0, 0), at("cup", 50, 0)], requirement).correct
    assert not judge([at("cow", 0, 0)], requirement).correct
    assert len(judge([at("dog", 0, 0)], requirement).reasons) == 3


def test_exclude_fails_at_its_count() -> None:
    requirement = include({"class": "cow", "count": 2}, exclude=[{"class": "cow", "count": 3}])
    cows = [at("cow", 20 * i, 0) for i in range(4)]
    assert [judge(cows[:n], requirement).correct for n in range(5)] == [False, False, True, False, False]
    assert judge(cows[:3], requirement).reasons == ["expected fewer than 3 cow, found 3"]


def test_never_filters_by_score() -> None:
    assert judge([at("cow", 0, 0, score=1e-6)], include({"class": "cow"})).correct
    assert not judge([at("cow", 0, 0, score=1e-6)], {"exclude": [{"class": "cow", "count": 1}]}).correct


def test_colour_is_looked_for_in_the_most_confident_n_only() -> None:
    requirement = include({"class": "cow", "color": "red"})
    red, blue = at("cow", 0, 0, 0.8, "red"), at("cow", 50, 0, 0.7, "blue")
    assert judge([blue, red], requirement).correct
    red = at("cow", 0, 0, 0.6, "red")
    verdict = judge([red, blue], requirement)
    assert verdict.reasons == ["expected 1 red cow, found 0 (blue)"]


def test_colour_must_match_n_times() -> None:
    requirement = include({"class": "cow", "count": 2, "color": "red"})
    cows = [at("cow", 0, 0, 0.9, "red"), at("cow", 20, 0, 0.8, "red"), at("cow", 40, 0, 0.7, "blue")]
    assert judge(cows, requirement).correct
    assert not judge([cows[0], cows[2]], requirement).correct
    assert not judge([cows[0], at("cow", 20, 0, 0.8, None)], requirement).correct


@pytest.mark.parametrize("relation", RELATIONS)
def test_position_of_a_clear_offset(relation: str) -> None:
    places = {"left of": (-50, 0), "right of": (50, 0), "above": (0, -50), "below": (0, 50)}
    requirement = include({"class": "cow"}, {"class": "cup", "position": [relation, 0]})
    for place, (x, y) in places.items():
        assert relative_position(at("cup", x, y), at("cow", 0, 0)) == {place}
        assert judge([at("cow", 0, 0), at("cup", x, y)], requirement).correct == (place == relation)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (0, 0, set()),
        (2, 0, set()),  # 0.1 (10 + 10) = 2 px: no relation at this distance
        (3.9, 0, set()),  # revised 1.9 / 3.9 = 0.487
        (4.1, 0, {"right of"}),  # 2.1 / 4.1 = 0.512
        (-50, -50, {"left of", "above"}),  # 48 / 70.7 = 0.679 on both axes
        (-9, -9, {"left of", "above"}),  # 7 / 12.7 = 0.550
        (6, 6, set()),  # 4 / 8.49 = 0.471: neither
        (30, 50, {"below"}),  # 28 / 58.3 = 0.480, 48 / 58.3 = 0.823
        (35, 50, {"below", "right of"}),  # 33 / 61.0 = 0.541
    ],
)
def test_position_thresholds(x: float, y: float, expected: set[str]) -> None:
    assert relative_position(at("a", x, y), at("b", 0, 0)) == expected


def test_position_of_a_vanishing_offset() -> None:
    """Between points the revised offset is the offset: under 0.001 px it is no relation."""
    origin = at("b", 0, 0, size=0)
    assert relative_position(at("a", 0.0009, 0, size=0), origin) == set()
    assert relative_position(at("a", 0.0011, 0, size=0), origin) == {"right of"}


def test_position_uses_the_sizes_of_both_objects_per_axis() -> None:
    wide = Detection("a", (-55, -5, 5, 5), 1.0)  # centre (-25, 0), 60 x 10
    assert relative_position(wide, at("b", 0, 0)) == {"left of"}  # (25 - 0.1 * 70) / 25 = 0.72
    assert relative_position(wide, at("b", 0, 0, size=80)) == set()  # (25 - 0.1 * 140) / 25 = 0.44


def test_position_holds_for_every_pair() -> None:
    requirement = include(
        {"class": "cow", "count": 2}, {"class": "cup", "count": 2, "position": ["left of", 0]}
    )
    cows = [at("cow", 100, 0, 0.9), at("cow", 200, 0, 0.8)]
    cups = [at("cup", 0, 0, 0.9), at("cup", 50, 0, 0.8)]
    assert judge(cows + cups, requirement).correct
    assert not judge([*cows, cups[0], at("cup", 150, 0, 0.8)], requirement).correct
    assert not judge([cows[0], at("cow", 20, 0, 0.8), *cups], requirement).correct
    # A third, less confident object of either class is not looked at.
    assert judge([*cows, *cups, at("cup", 300, 0, 0.1), at("cow", -300, 0, 0.1)], requirement).correct


def test_position_reason_names_what_was_found() -> None:
    requirement = include({"class": "cow"}, {"class": "cup", "position": ["above", 0]})
    assert judge([at("cow", 0, 0), at("cup", -50, 0)], requirement).reasons == [
        "expected cup above cow, found it left of cow"
    ]
    assert "no relation" in judge([at("cow", 0, 0), at("cup", 0, 0)], requirement).reasons[0]


@pytest.mark.parametrize(
    "first",
    [{"count": 2}, {"color": "red"}],
    ids=["too few", "wrong colour"],
)
def test_a_failed_clause_is_no_target(first: dict[str, Any]) -> None:
    requirement = include({"class": "cow", **first}, {"class": "cup", "position": ["left of", 0]})
    verdict = judge([at("cow", 50, 0, color="blue"), at("cup", 0, 0)], requirement)
    assert len(verdict.reasons) == 2
    assert verdict.reasons[1] == "no target for cup to be left of"


def test_a_clause_of_wrong_position_is_no_target() -> None:
    requirement = include(
        {"class": "cow"},
        {"class": "cup", "position": ["left of", 0]},
        {"class": "dog", "position": ["left of", 1]},
    )
    cow, dog = at("cow", 0, 0), at("dog", -90, 0)
    assert judge([cow, at("cup", -40, 0), dog], requirement).correct
    assert judge([cow, at("cup", 40, 0), dog], requirement).reasons[1] == "no target for dog to be left of"


LABELS = ("cow", "cup", "dog")
COLORS = ("red", "blue", None)


@st.composite
def scenes(draw: st.DrawFn) -> list[Detection]:
    """Up to 7 objects on whole pixels with distinct scores."""
    count = draw(st.integers(0, 7))
    scores = draw(st.permutations([i / 10 for i in range(1, 8)]))
    found = []
    for i in range(count):
        x, y = draw(st.integers(0, 60)), draw(st.integers(0, 60))
        box = (x, y, x + draw(st.integers(1, 30)), y + draw(st.integers(1, 30)))
        found.append(Detection(draw(st.sampled_from(LABELS)), box, scores[i], draw(st.sampled_from(COLORS))))
    return found


@st.composite
def requirements(draw: st.DrawFn) -> dict[str, Any]:
    clauses: list[dict[str, Any]] = []
    for index in range(draw(st.integers(1, 3))):
        clause: dict[str, Any] = {"class": draw(st.sampled_from(LABELS)), "count": draw(st.integers(1, 2))}
        if draw(st.booleans()):
            clause["color"] = draw(st.sampled_from(("red", "blue")))
        if index and draw(st.booleans()):
            clause["position"] = [draw(st.sampled_from(RELATIONS)), draw(st.integers(0, index - 1))]
        clauses.append(clause)
    exclude = [{"class": draw(st.sampled_from(LABELS)), "count": draw(st.integers(1, 4))}]
    requirement = {"include": clauses, "exclude": draw(st.sampled_from(([], exclude)))}
    check_requirement(requirement)
    return requirement


@given(scenes(), requirements(), st.randoms(use_true_random=False))
def test_order_of_detections_is_irrelevant(
    scene: list[Detection], requirement: dict[str, Any], random: Any
) -> None:
    shuffled = list(scene)
    random.shuffle(shuffled)
    assert judge(shuffled, requirement) == judge(scene, requirement)


@given(scenes(), requirements(), st.integers(-500, 500), st.integers(-500, 500))
def test_translation_invariant(scene: list[Detection], requirement: dict[str, Any], dx: int, dy: int) -> None:
    moved = [
        Detection(d.label, (d.box[0] + dx, d.box[1] + dy, d.box[2] + dx, d.box[3] + dy), d.score, d.color)
        for d in scene
    ]
    assert judge(moved, requirement) == judge(scene, requirement)


@given(scenes(), requirements(), st.integers(0, 60), st.floats(0, 1), st.sampled_from(COLORS))
def test_an_unrelated_object_changes_nothing(
    scene: list[Detection], requirement: dict[str, Any], x: int, score: float, color: str | None
) -> None:
    unrelated = at("kite", x, x, score, color)
    assert judge([unrelated, *scene], requirement) == judge(scene, requirement)


@given(scenes(), st.sampled_from(RELATIONS))
def test_a_relation_and_its_opposite_swap_with_the_objects(scene: list[Detection], relation: str) -> None:
    opposite = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
    for a in scene:
        for b in scene:
            assert (relation in relative_position(a, b)) == (opposite[relation] in relative_position(b, a))


def test_task_scores() -> None:
    marks = {task: [True] * i + [False] * (6 - i) for i, task in enumerate(TASKS, start=1)}
    marks["counting"] = [True]  # tasks weigh the same, whatever their size
    records = [{"tag": tag, "correct": c} for tag, values in marks.items() for c in values]
    scores = task_scores(records)
    expected = [1 / 6, 2 / 6, 1, 4 / 6, 5 / 6, 1]
    assert [scores.tasks[task] for task in TASKS] == pytest.approx(expected)
    assert scores.overall == pytest.approx(sum(expected) / 6)


def test_task_scores_with_missing_tasks_and_bad_records() -> None:
    scores = task_scores([{"tag": "colors", "correct": True}, {"tag": "position", "correct": False}])
    assert scores.overall == 0.5
    assert scores.tasks["counting"] is None and scores.tasks["position"] == 0.0
    with pytest.raises(DataError, match="record 0: `tag` is 'colour'"):
        task_scores([{"tag": "colour", "correct": True}])
    with pytest.raises(DataError, match="`correct` is 'no'"):
        task_scores([{"tag": "colors", "correct": "no"}])
    with pytest.raises(ValueError, match="no records"):
        task_scores([])


COW = {"class": "cow", "count": 1}


@pytest.mark.parametrize(
    ("requirement", "message"),
    [
        ([], "requirement must be an object, not list"),
        ({}, "neither `include` nor `exclude`"),
        ({"include": []}, "neither `include` nor `exclude`"),
        ({"include": [COW], "exlude": []}, "unknown key `exlude`"),
        ({"include": COW}, "`include` must be a list"),
        ({"include": ["cow"]}, r"`include\[0\]` must be an object"),
        ({"include": [COW, {"count": 1}]}, r"`include\[1\].class` must be a name, not None"),
        ({"include": [{"class": "cow"}]}, r"`include\[0\].count` .* not None"),
        ({"include": [{**COW, "count": 0}]}, r"`include\[0\].count`"),
        ({"include": [{**COW, "count": 1.5}]}, r"`include\[0\].count`"),
        ({"include": [{**COW, "count": True}]}, r"`include\[0\].count`"),
        ({"include": [{**COW, "color": ""}]}, r"`include\[0\].color`"),
        ({"include": [{**COW, "color": ["red"]}]}, r"`include\[0\].color`"),
        ({"include": [{**COW, "colour": "red"}]}, r"`include\[0\].colour` is unknown"),
        ({"exclude": [{**COW, "color": "red"}]}, r"`exclude\[0\].color` is unknown"),
        ({"exclude": [{"class": 3, "count": 1}]}, r"`exclude\[0\].class`"),
        ({"include": [COW, {**COW, "position": "above"}]}, r"`include\[1\].position` must be a relation"),
        ({"include": [COW, {**COW, "position": ["beside", 0]}]}, r"`include\[1\].position` names 'beside'"),
        ({"include": [COW, {**COW, "position": ["above", 1]}]}, "earlier clause, not 1"),
        ({"include": [COW, {**COW, "position": ["above", -1]}]}, "earlier clause, not -1"),
        ({"include": [COW, {**COW, "position": ["above", "0"]}]}, "earlier clause"),
    ],
)
def test_check_requirement_names_the_key(requirement: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_requirement(requirement)


def test_check_requirement_names_the_place_and_the_nearest_key() -> None:
    with pytest.raises(DataError, match="^line 7: ") as caught:
        check_requirement({"include": [{**COW, "colour": "red"}]}, "line 7")
    assert caught.value.hint == "Did you mean `color`?"


def test_check_requirement_lets_other_keys_through() -> None:
    check_requirement({"tag": "colors", "prompt": "a cow", "seed": 3, "include": [COW]})
    check_requirement({"exclude": [COW]})


def _published() -> Path | None:
    """GenEval's metadata file, where a folder above this one has it."""
    paths = (parent / "shared/data/benchmarks" / BENCHMARK for parent in Path(__file__).resolve().parents)
    return next((path for path in paths if path.is_file()), None)


def test_every_published_requirement_is_accepted() -> None:
    path = _published()
    if path is None:
        pytest.skip(f"{BENCHMARK} is not on this machine")
    requirements = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(requirements) == 553
    for number, requirement in enumerate(requirements, start=1):
        check_requirement(requirement, f"line {number}")
        assert requirement["tag"] in TASKS
        assert not judge([], requirement).correct
        assert judge(_fulfil(requirement), requirement).correct


def _fulfil(requirement: dict[str, Any]) -> list[Detection]:
    """Objects in a row, or where their clause's relation to the object at the origin wants them."""
    shifts = {"left of": (-500, 0), "right of": (500, 0), "above": (0, -500), "below": (0, 500)}
    found = []
    for index, clause in enumerate(requirement["include"]):
        x, y = shifts[clause["position"][0]] if "position" in clause else (0, 100 * index)
        for i in range(clause["count"]):
            found.append(at(clause["class"], x + 20 * i, y, color=clause.get("color")))
    return found

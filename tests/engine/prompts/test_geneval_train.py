"""GenEval's training prompts: the grammar, the mix, and that no scene of the test set is among them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any

import pytest

from rtdmd_cli.engine.judges.geneval import Detection, check_requirement, judge
from rtdmd_cli.engine.judges.vocabulary import CLASSES, COLOURS
from rtdmd_cli.engine.prompts.geneval_train import (
    MIX,
    PROMPTS,
    VALIDATION_PROMPTS,
    as_text,
    held_out_hashes,
    prompt_of,
    scene_hash,
    training_requirements,
    validation_requirements,
)
from rtdmd_cli.engine.prompts.public_sets import DATA
from tests.public_data import benchmark_file


@pytest.fixture(scope="module")
def made() -> list[dict[str, Any]]:
    return training_requirements()


@pytest.fixture(scope="module")
def test_set() -> list[dict[str, Any]]:
    return [json.loads(line) for line in benchmark_file("geneval.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def validation() -> list[dict[str, Any]]:
    return validation_requirements()


def test_the_sets_are_the_same_everywhere(
    made: list[dict[str, Any]], validation: list[dict[str, Any]]
) -> None:
    for name, found, count in (
        ("geneval-train", made, PROMPTS),
        ("geneval-val", validation, VALIDATION_PROMPTS),
    ):
        text, data = as_text(found), DATA[name]
        assert hashlib.sha256(text.encode()).hexdigest() == data.sha256
        assert (len(found), len(text)) == (data.prompts, data.size) == (count, data.size)
    assert training_requirements(17, 1) == training_requirements(17, 1) != training_requirements(17, 2)


def test_what_is_measured_while_training_is_neither_trained_on_nor_the_benchmark(
    test_set: list[dict[str, Any]], made: list[dict[str, Any]], validation: list[dict[str, Any]]
) -> None:
    measured = {scene_hash(each) for each in validation}
    assert len(measured) > 300 and not measured & {scene_hash(each) for each in made}
    assert not measured & {scene_hash(each) for each in test_set}
    assert Counter(each["tag"] for each in validation) == {task: 30 * share for task, share in MIX.items()}
    for each in validation:
        check_requirement(each, each["prompt"])


def test_the_mix_of_tasks_is_the_published_one(made: list[dict[str, Any]]) -> None:
    counts = Counter(each["tag"] for each in made)
    assert counts.keys() == MIX.keys() and counts.total() == PROMPTS
    for task, share in {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}.items():
        assert counts[task] == pytest.approx(PROMPTS * share / 17, abs=5)
    assert Counter(each["tag"] for each in training_requirements(17)) == MIX


def test_every_line_is_one_the_judge_can_read(made: list[dict[str, Any]]) -> None:
    for number, each in enumerate(made):
        check_requirement(each, f"line {number}")
        assert {clause["class"] for clause in each["include"]} <= set(CLASSES)
        colours = [clause.get("color") for clause in each["include"]]
        assert set(colours) <= {None, *COLOURS}
        assert all(c["class"] != "person" for c in each["include"] if "color" in c)
        if len(each["include"]) == 2:
            assert each["include"][0]["class"] != each["include"][1]["class"]
            assert each["tag"] == "position" or colours[0] is None or colours[0] != colours[1]
    assert {clause["class"] for each in made for clause in each["include"]} == set(CLASSES)


def test_a_scene_as_described_is_judged_right(made: list[dict[str, Any]]) -> None:
    """Objects placed as the line says pass; the same with one object more or mirrored does not."""
    boxes = {"left of": (0, 200), "right of": (400, 200), "above": (200, 0), "below": (200, 400)}
    for each in made[::500]:
        found = []
        for clause in each["include"]:
            x, y = boxes[clause["position"][0]] if "position" in clause else (200, 200)
            box = (x, y, x + 50, y + 50)
            found += [Detection(clause["class"], box, 0.9, clause.get("color"))] * clause["count"]
        assert judge(found, each).correct
        if each["tag"] == "counting":
            assert not judge([*found, found[0]], each).correct
        if each["tag"] == "position":
            a, b = found
            swapped = [Detection(a.label, b.box, 0.9), Detection(b.label, a.box, 0.9)]
            assert not judge(swapped, each).correct


def test_the_grammar_is_that_of_the_test_set(test_set: list[dict[str, Any]]) -> None:
    assert len(test_set) == 553
    assert [prompt_of(each) for each in test_set] == [each["prompt"] for each in test_set]


def test_no_scene_of_the_test_set_is_trained_on(
    test_set: list[dict[str, Any]], made: list[dict[str, Any]]
) -> None:
    assert {scene_hash(each) for each in test_set} == held_out_hashes()
    assert not {each["prompt"] for each in test_set} & {each["prompt"] for each in made}
    trained = {scene_hash(each) for each in made}
    assert not trained & held_out_hashes()
    turned = [each | {"include": each["include"][::-1]} for each in test_set if each["tag"] != "position"]
    assert not {prompt_of(each) for each in turned} & {each["prompt"] for each in made}


def test_the_hash_of_a_scene() -> None:
    def position(placed: str, relation: str, target: str) -> dict[str, Any]:
        clauses = [{"class": target, "count": 1}, {"class": placed, "count": 1, "position": [relation, 0]}]
        return {"tag": "position", "include": clauses}

    def pair(*things: tuple[str, str]) -> dict[str, Any]:
        clauses = [{"class": label, "count": 1, "color": colour} for label, colour in things]
        return {"tag": "color_attr", "include": clauses}

    assert scene_hash(position("dog", "left of", "cat")) == scene_hash(position("cat", "right of", "dog"))
    assert scene_hash(position("dog", "above", "cat")) == scene_hash(position("cat", "below", "dog"))
    assert scene_hash(pair(("dog", "red"), ("cat", "pink"))) == scene_hash(
        pair(("cat", "pink"), ("dog", "red"))
    )
    different = [
        position("dog", "left of", "cat"),
        position("dog", "right of", "cat"),
        position("dog", "above", "cat"),
        pair(("dog", "red"), ("cat", "pink")),
        pair(("dog", "pink"), ("cat", "red")),
        {"tag": "counting", "include": [{"class": "dog", "count": 2}]},
        {"tag": "counting", "include": [{"class": "dog", "count": 3}]},
    ]
    assert len({scene_hash(each) for each in different}) == len(different)

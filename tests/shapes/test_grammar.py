"""The grammar: captions parse back, say what GenEval's metadata says, and their scenes show them."""

from typing import Any

import numpy as np
import pytest

from rtdmd_cli.engine.judges.geneval import Detection, check_requirement, judge
from rtdmd_cli.shapes.grammar import (
    TASKS,
    Caption,
    Thing,
    all_captions,
    combination,
    parse,
    requirement,
    scene_for,
    with_colours,
)
from rtdmd_cli.shapes.prompts import benchmark, training_captions
from rtdmd_cli.shapes.render import CELL, COLOURS, SHAPES, Scene

RED_RING, BLUE_CROSS = Thing("ring", "red"), Thing("cross", "blue")
COUNTS = {
    "single_object": 6,
    "two_object": 30,
    "counting": 144,
    "colors": 48,
    "position": 120,
    "color_attr": 1680,
}


def seen(scene: Scene) -> list[Detection]:
    """What a perfect detector finds."""
    return [Detection(i.shape, (i.x, i.y, i.x + i.size, i.y + i.size), 1.0, i.colour) for i in scene.items]


@pytest.mark.parametrize("task", TASKS)
def test_every_caption_of_the_grammar_parses_back(task: str) -> None:
    captions = all_captions(task)
    assert len({caption.text for caption in captions}) == len(captions) == COUNTS[task]
    assert all(parse(caption.text) == caption and caption.task == task for caption in captions)


def test_training_captions_parse_back() -> None:
    captions = training_captions(3000, seed=4)
    assert all(parse(caption.text) == caption for caption in captions)
    assert any(caption.task == "position" and caption.things[0].colour for caption in captions)
    assert any(caption.task == "counting" and not caption.things[0].colour for caption in captions)


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("a photo of a circle", Caption("single_object", (Thing("circle"),))),
        ("a photo of three red crosses", Caption("counting", (Thing("cross", "red", 3),))),
        ("a photo of an orange ring", Caption("colors", (Thing("ring", "orange"),))),
        (
            "a photo of a red ring left of a blue cross",
            Caption("position", (RED_RING, BLUE_CROSS), "left of"),
        ),
        ("a photo of a red ring and a blue cross", Caption("color_attr", (RED_RING, BLUE_CROSS))),
    ],
)
def test_captions_in_words(text: str, caption: Caption) -> None:
    assert caption.text == text
    assert parse(f"{text.upper()}.") == caption


@pytest.mark.parametrize(
    "text",
    [
        "",
        "two circles",
        "a photo of a star",
        "a photo of a pink circle",
        "a photo of five circles",
        "a photo of two circle",
        "a photo of a big red circle",
        "a photo of a circle and",
        "a photo of a circle beside a square",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse(text)


@pytest.mark.parametrize(
    ("text", "include", "exclude"),
    [
        ("a photo of a ring", [{"class": "ring", "count": 1}], None),
        ("a photo of a red ring", [{"class": "ring", "count": 1, "color": "red"}], None),
        (
            "a photo of two red rings",
            [{"class": "ring", "count": 2, "color": "red"}],
            [{"class": "ring", "count": 3}],
        ),
        (
            "a photo of a ring above a cross",
            [{"class": "cross", "count": 1}, {"class": "ring", "count": 1, "position": ["above", 0]}],
            None,
        ),
    ],
)
def test_requirements_are_genevals(
    text: str, include: list[dict[str, Any]], exclude: list[dict[str, Any]] | None
) -> None:
    entry = requirement(parse(text))
    check_requirement(entry)
    assert entry["include"] == include and entry.get("exclude") == exclude
    assert entry["prompt"] == text and entry["tag"] == parse(text).task


def test_scenes_obey_their_caption_and_show_nothing_else() -> None:
    rng = np.random.default_rng(0)
    for caption in [*benchmark(), *training_captions(500, seed=1)]:
        scene = scene_for(caption, rng)
        verdict = judge(seen(scene), requirement(caption))
        assert verdict.correct, (caption.text, verdict.reasons)
        assert len(scene.items) == sum(thing.count for thing in caption.things)
        cells = {(item.x // CELL, item.y // CELL) for item in scene.items}
        assert len(cells) == len(scene.items)


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_another_relation_is_refused(relation: str) -> None:
    rng = np.random.default_rng(2)
    things = (Thing("ring"), Thing("cross"))
    for other in ("left of", "right of", "above", "below"):
        scene = scene_for(Caption("position", things, relation), rng)
        verdict = judge(seen(scene), requirement(Caption("position", things, other)))
        assert verdict.correct == (other == relation)


def test_swapped_colours_and_another_number_are_refused() -> None:
    rng = np.random.default_rng(3)
    scene = scene_for(Caption("color_attr", (RED_RING, BLUE_CROSS)), rng)
    swapped = Caption("color_attr", (Thing("ring", "blue"), Thing("cross", "red")))
    assert not judge(seen(scene), requirement(swapped)).correct
    three = scene_for(Caption("counting", (Thing("ring", None, 3),)), rng)
    for number, right in ((2, False), (3, True), (4, False)):
        caption = Caption("counting", (Thing("ring", None, number),))
        assert judge(seen(three), requirement(caption)).correct == right


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("a circle left of a square", "a square right of a circle", True),
        ("a circle left of a square", "a red circle left of a blue square", True),
        ("a circle left of a square", "a circle right of a square", False),
        ("a circle above a square", "a circle left of a square", False),
        ("a circle and a square", "a square and a circle", True),
        ("a red circle and a blue square", "a blue square and a red circle", True),
        ("a red circle and a blue square", "a blue circle and a red square", False),
        ("two red circles", "three red circles", False),
    ],
)
def test_what_counts_as_one_combination(first: str, second: str, same: bool) -> None:
    combinations = [combination(parse(f"a photo of {text}")) for text in (first, second)]
    assert (combinations[0] == combinations[1]) == same


def test_colours_left_open_are_drawn_from_all() -> None:
    rng = np.random.default_rng(5)
    drawn = {scene_for(Caption("single_object", (Thing("ring"),)), rng).items[0].colour for _ in range(200)}
    assert drawn == set(COLOURS)
    coloured = with_colours(parse("a photo of a ring above a cross"), rng)
    assert all(thing.colour in COLOURS for thing in coloured.things) and coloured.relation == "above"


def test_the_same_seed_gives_the_same_scene() -> None:
    caption = parse("a photo of four circles")
    scenes = [scene_for(caption, np.random.default_rng(seed)) for seed in (7, 7, 8)]
    assert scenes[0] == scenes[1] != scenes[2]


def test_there_are_enough_shapes_and_colours() -> None:
    assert len(SHAPES) >= 6 and len(COLOURS) >= 8

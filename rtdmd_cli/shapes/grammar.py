"""Captions of the shapes world in the grammar of GenEval's six tasks, and the scenes that show them.

    single_object   a photo of a circle
    two_object      a photo of a circle and a square
    counting        a photo of three red circles            (colours added: 3 x 6 plain prompts are too few)
    colors          a photo of a red circle
    position        a photo of a circle left of a square    (in training also with colours)
    color_attr      a photo of a red circle and a blue square

`requirement()` gives the dictionary that the GenEval judge reads, in the layout of GenEval's own metadata.
"""

from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np

from rtdmd_cli.shapes.render import CELLS, COLOURS, SHAPES, Scene, random_scene

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Thing:
    """A noun of a caption: `count` shapes of one kind, in a colour where one is named."""

    shape: str
    colour: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Caption:
    """A caption as data: one or two things, and for `position` how the first lies to the second."""

    task: str
    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def text(self) -> str:
        """The caption in words."""
        nouns = [_noun(thing) for thing in self.things]
        return "a photo of " + f" {self.relation or 'and'} ".join(nouns)


def _noun(thing: Thing) -> str:
    colour = f"{thing.colour} " if thing.colour else ""
    if thing.count == 1:
        article = "an" if (thing.colour or thing.shape)[0] in "aeiou" else "a"
        return f"{article} {colour}{thing.shape}"
    plural = thing.shape + ("es" if thing.shape.endswith("s") else "s")
    return f"{NUMBERS[thing.count]} {colour}{plural}"


def parse(text: str) -> Caption:
    """Read a caption back.

    Raises:
        ValueError: the text is not a caption of this grammar.
    """
    words = text.lower().strip().rstrip(".").split()
    if words[:3] != ["a", "photo", "of"]:
        raise ValueError(f"{text!r} does not start with 'a photo of'")
    body = " ".join(words[3:])
    for joint in ("and", *RELATIONS):
        if f" {joint} " in body:
            first, second = body.split(f" {joint} ", 1)
            things = (_parse_noun(first), _parse_noun(second))
            if joint != "and":
                return Caption("position", things, joint)
            return Caption("color_attr" if any(thing.colour for thing in things) else "two_object", things)
    thing = _parse_noun(body)
    task = "counting" if thing.count > 1 else "colors" if thing.colour else "single_object"
    return Caption(task, (thing,))


def _parse_noun(noun: str) -> Thing:
    number, *rest = noun.split()
    counts = {"a": 1, "an": 1} | {word: count for count, word in NUMBERS.items()}
    if number not in counts or not 1 <= len(rest) <= 2:
        raise ValueError(f"{noun!r} is not 'a SHAPE', 'a COLOUR SHAPE' or 'NUMBER [COLOUR] SHAPES'")
    count = counts[number]
    shapes = {_noun(Thing(shape, None, count)).split()[-1]: shape for shape in SHAPES}
    colour = rest[0] if len(rest) == 2 else None
    if rest[-1] not in shapes or (colour is not None and colour not in COLOURS):
        raise ValueError(f"{noun!r} names a shape or colour this world does not have")
    return Thing(shapes[rest[-1]], colour, count)


def requirement(caption: Caption) -> dict[str, Any]:
    """What a picture must show, as GenEval's metadata says it: tag, include, exclude, prompt."""
    include: list[dict[str, Any]] = []
    for thing in caption.things:
        clause: dict[str, Any] = {"class": thing.shape, "count": thing.count}
        if thing.colour:
            clause["color"] = thing.colour
        include.append(clause)
    if caption.relation:  # GenEval states the relation on the later clause, towards the earlier one
        include = [include[1], include[0] | {"position": [caption.relation, 0]}]
    entry: dict[str, Any] = {"tag": caption.task, "include": include}
    if caption.task == "counting":
        entry["exclude"] = [{"class": caption.things[0].shape, "count": caption.things[0].count + 1}]
    return entry | {"prompt": caption.text}


def combination(caption: Caption) -> tuple[str, ...]:
    """What makes two captions ask for the same picture: the task's full combination, colours of `position` left out.

    "A left of B" and "B right of A" are one combination, and so are "A and B" and "B and A".
    """
    things = caption.things
    if caption.task == "position":
        first, second = (thing.shape for thing in things)
        relation = caption.relation or ""
        return min((first, relation, second), (second, _INVERSE[relation], first))
    return tuple(sorted(f"{thing.count} {thing.colour} {thing.shape}" for thing in things))


def all_captions(task: str) -> list[Caption]:
    """Every caption of a task that the benchmark may use, in a fixed order."""
    colours = tuple(COLOURS)
    pairs = list(permutations(SHAPES, 2))
    match task:
        case "single_object":
            return [Caption(task, (Thing(shape),)) for shape in SHAPES]
        case "two_object":
            return [Caption(task, (Thing(a), Thing(b))) for a, b in pairs]
        case "counting":
            return [Caption(task, (Thing(s, c, n),)) for n in NUMBERS for s in SHAPES for c in colours]
        case "colors":
            return [Caption(task, (Thing(s, c),)) for s in SHAPES for c in colours]
        case "position":
            return [Caption(task, (Thing(a), Thing(b)), r) for a, b in pairs for r in RELATIONS]
        case "color_attr":
            hues = list(permutations(colours, 2))
            return [Caption(task, (Thing(a, c), Thing(b, d))) for a, b in pairs for c, d in hues]
    raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")


def with_colours(caption: Caption, rng: np.random.Generator) -> Caption:
    """The same caption with a random colour on every thing."""
    hues = rng.choice(list(COLOURS), size=len(caption.things)).tolist()
    things = tuple(Thing(t.shape, hue, t.count) for t, hue in zip(caption.things, hues, strict=True))
    return Caption(caption.task, things, caption.relation)


def scene_for(caption: Caption, rng: np.random.Generator) -> Scene:
    """A random picture that shows the caption and nothing else; what the caption leaves open is drawn uniformly."""
    cells = _cells(caption, rng)
    shapes = [(thing.shape, thing.colour) for thing in caption.things for _ in range(thing.count)]
    hues = [colour or str(rng.choice(list(COLOURS))) for _, colour in shapes]
    return random_scene([(s, hue, cell) for (s, _), hue, cell in zip(shapes, hues, cells, strict=True)], rng)


def _cells(caption: Caption, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Distinct cells for the caption's shapes, in the caption's order; a relation puts both in one row or column."""
    order = [CELLS[i] for i in rng.permutation(len(CELLS))]
    if caption.relation is None:
        return order[: sum(thing.count for thing in caption.things)]
    line = int(rng.integers(2))
    across = caption.relation in ("left of", "right of")
    pair = [(line, 0), (line, 1)] if across else [(0, line), (1, line)]
    return pair if caption.relation in ("left of", "above") else pair[::-1]

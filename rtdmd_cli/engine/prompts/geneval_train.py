"""GenEval's training prompts, made here from the published grammar, none of them a scene of the test set.

A sixteenth of all other scenes, chosen by their hash, is kept for the validation set: what is measured while a run
trains is neither trained on nor the benchmark itself.

The grammar is that of GenEval's authors (Ghosh et al. 2023, djghosh13/geneval, prompts/create_prompts.py): COCO's 80
classes, ten colours, numbers from two to four, four positions. The mix of tasks and the rule for what counts as the
same prompt are those of the published training set (Flow-GRPO, arXiv 2505.05470): position 7, counting 5, colour
attribution 3, colours 1, two objects 1, single object 0; prompts that differ in the order of their objects only are the same.

The test set itself is not part of this package: `geneval_held_out.txt` holds a short hash of each of its scenes.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from hashlib import blake2b
from importlib.resources import files
from typing import Any

from rtdmd_cli.engine.judges.geneval import RELATIONS
from rtdmd_cli.engine.judges.vocabulary import CLASSES, COLOURS

MIX = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
"""Shares of the tasks."""
PROMPTS, SEED = 50_000, 0
"""Of the set `data:geneval-train`."""
VALIDATION_PROMPTS, VALIDATION_SEED = 510, 1
"""Of the set `data:geneval-val`."""
VALIDATION_SHARE = 16  # one scene in so many
HELD_OUT = "geneval_held_out.txt"
NUMBERS = {2: "two", 3: "three", 4: "four"}
MIRRORED = {"right of": "left of", "below": "above"}
PERSON = "person"  # has no colour

Requirement = dict[str, Any]


def training_requirements(count: int = PROMPTS, seed: int = SEED) -> list[Requirement]:
    """`count` requirements in the format of the judge (`evaluation.geneval`), each with its "prompt", task after task.

    Drawn with replacement from what is no scene of the test set and none of the validation set: a prompt stands as
    often as it was drawn, which keeps the mix (of `counting` there are fewer than 240 in all). The same arguments
    give the same list everywhere.
    """
    return _requirements(count, seed, validation=False)


def validation_requirements(
    count: int = VALIDATION_PROMPTS, seed: int = VALIDATION_SEED
) -> list[Requirement]:
    """The same of the scenes that are kept for validation. Of `counting` these are ten, which stand many times."""
    return _requirements(count, seed, validation=True)


def _requirements(count: int, seed: int, validation: bool) -> list[Requirement]:
    held_out, source = held_out_hashes(), random.Random(seed)
    found = []
    for task, number in _numbers(count).items():
        draws = _draws(task, source)
        while number:
            requirement = next(draws)
            scene = scene_hash(requirement)
            if scene not in held_out and is_validation(scene) == validation:
                found.append(requirement | {"prompt": prompt_of(requirement)})
                number -= 1
    return found


def is_validation(scene: str) -> bool:
    """Whether a scene, by its hash, is kept for validation."""
    return int(scene, 16) % VALIDATION_SHARE == 0


def as_text(requirements: Sequence[Requirement]) -> str:
    """Requirements as a .jsonl file's text."""
    return "".join(f"{json.dumps(each)}\n" for each in requirements)


def prompt_of(requirement: Mapping[str, Any]) -> str:
    """The sentence of a requirement of any task, as GenEval writes it."""
    task, include = requirement["tag"], requirement["include"]
    if task == "counting":
        return f"a photo of {NUMBERS[include[0]['count']]} {_plural(include[0]['class'])}"
    if task == "position":
        target, placed = include
        return f"a photo of {_named(placed)} {placed['position'][0]} {_named(target)}"
    return "a photo of " + " and ".join(_named(clause) for clause in include)


def scene_hash(requirement: Mapping[str, Any]) -> str:
    """10 hexadecimal digits, equal for requirements that ask for the same scene.

    The order of objects makes no difference, and "a right of b" is "b left of a".
    """
    task, include = requirement["tag"], requirement["include"]
    if task == "position":
        target, placed = include
        relation, order = placed["position"][0], [placed["class"], target["class"]]
        parts = [MIRRORED[relation], *reversed(order)] if relation in MIRRORED else [relation, *order]
    else:
        parts = sorted(f"{each['count']} {each.get('color', '')} {each['class']}" for each in include)
    return blake2b("|".join([task, *parts]).encode(), digest_size=5).hexdigest()


@cache
def held_out_hashes() -> frozenset[str]:
    """`scene_hash` of every scene of GenEval's 553 test prompts."""
    text = (files("rtdmd_cli.engine.prompts") / HELD_OUT).read_text("ascii")
    return frozenset(text.split())


def _numbers(count: int) -> dict[str, int]:
    """Prompts of each task: `count` by `MIX`, what rounding leaves over goes to the largest share."""
    whole = sum(MIX.values())
    numbers = {task: count * share // whole for task, share in MIX.items()}
    numbers[max(MIX, key=lambda task: MIX[task])] += count - sum(numbers.values())
    return numbers


def _draws(task: str, source: random.Random) -> Iterator[Requirement]:
    while True:
        if task == "counting":
            label, number = _one(CLASSES, source), 2 + source.randrange(3)
            clauses = {"include": [_clause(label, number)], "exclude": [_clause(label, number + 1)]}
        elif task == "position":
            placed, target = _two(CLASSES, source)
            clauses = {
                "include": [_clause(target), _clause(placed) | {"position": [_one(RELATIONS, source), 0]}]
            }
        elif task == "two_object":
            clauses = {"include": [_clause(label) for label in _two(CLASSES, source)]}
        else:
            things = [label for label in CLASSES if label != PERSON]
            labels = _two(things, source) if task == "color_attr" else [_one(things, source)]
            colours = _two(COLOURS, source) if task == "color_attr" else [_one(COLOURS, source)]
            clauses = {
                "include": [
                    _clause(label) | {"color": colour} for label, colour in zip(labels, colours, strict=True)
                ]
            }
        yield {"tag": task, **clauses}


def _clause(label: str, count: int = 1) -> Requirement:
    return {"class": label, "count": count}


def _one(options: Sequence[str], source: random.Random) -> str:
    return options[source.randrange(len(options))]


def _two(options: Sequence[str], source: random.Random) -> list[str]:
    """Two different ones."""
    first = source.randrange(len(options))
    second = (first + 1 + source.randrange(len(options) - 1)) % len(options)
    return [options[first], options[second]]


def _named(clause: Mapping[str, Any]) -> str:
    words = " ".join(part for part in (clause.get("color"), clause["class"]) if part)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(label: str) -> str:
    return f"{label}es" if label.endswith("s") else f"{label}s"

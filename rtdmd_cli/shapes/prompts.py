"""Training and held-out prompt sets of the shapes world. Both are fixed: no seed, no state, the same on every machine."""

from functools import cache
from hashlib import blake2b

import numpy as np

from rtdmd_cli.shapes.grammar import NUMBERS, TASKS, Caption, Thing, all_captions, combination, with_colours
from rtdmd_cli.shapes.render import SHAPES

BENCHMARK_SIZES = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
"""Prompts of every task, GenEval's own mix: 553 in all."""
_HELD_OUT_SHARE = {"two_object": 1 / 3, "counting": 0.3, "colors": 0.25, "position": 0.3, "color_attr": 1 / 6}
_TRAINING_MIX = {
    "single_object": 0.06,
    "two_object": 0.2,
    "counting": 0.17,
    "colors": 0.07,
    "position": 0.22,
    "color_attr": 0.28,
}


def _rank(caption: Caption) -> bytes:
    """A fixed pseudo-random order of combinations."""
    return blake2b("|".join(combination(caption)).encode(), digest_size=8, key=b"rtdmd shapes").digest()


@cache
def held_out_combinations(task: str) -> frozenset[tuple[str, ...]]:
    """The combinations of a task that no training prompt of that task asks for.

    Empty for single_object: with six shapes and nothing else to combine, training and benchmark share its prompts.
    """
    if task not in _HELD_OUT_SHARE:
        return frozenset()
    ranked = sorted(
        {combination(caption): _rank(caption) for caption in all_captions(task)}.items(), key=lambda kv: kv[1]
    )
    return frozenset(key for key, _ in ranked[: round(len(ranked) * _HELD_OUT_SHARE[task])])


@cache
def _split(task: str, held_out: bool) -> tuple[Caption, ...]:
    hidden = held_out_combinations(task)
    if not hidden:
        return tuple(all_captions(task))
    return tuple(caption for caption in all_captions(task) if (combination(caption) in hidden) == held_out)


@cache
def benchmark() -> tuple[Caption, ...]:
    """The held-out benchmark: 553 captions in GenEval's task mix, task after task.

    A task with fewer distinct held-out captions than its share repeats them in turn (see `benchmark_facts`).
    """
    chosen: list[Caption] = []
    for task in TASKS:
        captions = sorted(_split(task, held_out=True), key=lambda c: (_rank(c), c.text))
        chosen += [captions[i % len(captions)] for i in range(BENCHMARK_SIZES[task])]
    return tuple(chosen)


def benchmark_facts() -> dict[str, dict[str, int]]:
    """For every task: prompts in the benchmark, how many of them are distinct, and how many are also training prompts."""
    facts = {}
    for task in TASKS:
        captions = [c for c in benchmark() if c.task == task]
        seen = 0 if held_out_combinations(task) else len(captions)
        facts[task] = {"prompts": len(captions), "distinct": len(set(captions)), "shared_with_training": seen}
    return facts


def training_captions(count: int, seed: int) -> list[Caption]:
    """Draw training captions: tasks by a fixed mix, captions of a task uniformly, none of a held-out combination.

    Half of the `position` captions name colours, a quarter of the `counting` captions name none, and three in ten of the
    `color_attr` captions name the colour of one shape only.
    """
    rng = np.random.default_rng(seed)
    tasks = rng.choice(list(_TRAINING_MIX), size=count, p=list(_TRAINING_MIX.values())).tolist()
    return [_draw(task, rng) for task in tasks]


def _draw(task: str, rng: np.random.Generator) -> Caption:
    if task == "counting" and rng.random() < 0.25:
        shape, number = str(rng.choice(SHAPES)), int(rng.choice(list(NUMBERS)))
        return Caption(task, (Thing(shape, None, number),))
    captions = _split(task, held_out=False)
    caption = captions[int(rng.integers(len(captions)))]
    if task == "color_attr" and rng.random() < 0.3:
        return _half_coloured(caption, int(rng.integers(2)))
    return with_colours(caption, rng) if task == "position" and rng.random() < 0.5 else caption


def _half_coloured(caption: Caption, plain: int) -> Caption:
    """The caption without the colour of its thing number `plain`."""
    things = tuple(Thing(t.shape, None if i == plain else t.colour) for i, t in enumerate(caption.things))
    return Caption(caption.task, things)

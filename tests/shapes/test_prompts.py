"""The prompt sets: GenEval's mix, nothing shared between training and benchmark, nothing random left."""

from collections import Counter
from hashlib import sha256

import pytest

from rtdmd_cli.shapes.grammar import TASKS, all_captions, combination
from rtdmd_cli.shapes.prompts import benchmark, benchmark_facts, held_out_combinations, training_captions

GENEVAL_MIX = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
BENCHMARK_SHA256 = "6537f546395c5977dec877d534d02a9a8d637303319f51d6a9f56e3e7e2add70"
TRAINING_SHA256 = "581be032964bb02afb5fe71dec79f2f9136951b6420e71486e6c8297528cc426"


def test_the_benchmark_has_genevals_553_prompts() -> None:
    assert len(benchmark()) == 553
    assert Counter(caption.task for caption in benchmark()) == GENEVAL_MIX


@pytest.mark.parametrize("task", TASKS)
def test_training_asks_for_no_held_out_combination(task: str) -> None:
    trained = {combination(c) for c in training_captions(20_000, seed=9) if c.task == task}
    asked = {combination(c) for c in benchmark() if c.task == task}
    assert trained and asked
    if (
        task == "single_object"
    ):  # six prompts and nothing to combine: the task shares them, and the facts say so
        assert trained == asked
    else:
        assert not trained & asked
        assert asked <= held_out_combinations(task)


def test_training_reaches_every_other_combination() -> None:
    captions = training_captions(20_000, seed=9)
    for task in ("two_object", "colors", "position"):
        free = {combination(c) for c in all_captions(task)} - held_out_combinations(task)
        assert {combination(c) for c in captions if c.task == task} == free


def test_repeats_are_even_and_stated() -> None:
    facts = benchmark_facts()
    for task in TASKS:
        times = Counter(caption for caption in benchmark() if caption.task == task)
        assert facts[task]["prompts"] == GENEVAL_MIX[task] and facts[task]["distinct"] == len(times)
        assert max(times.values()) - min(times.values()) <= 1
        assert facts[task]["shared_with_training"] == (80 if task == "single_object" else 0)
    assert facts["color_attr"]["distinct"] == 100


def test_both_sets_are_the_same_on_every_machine() -> None:
    def digest(texts: list[str]) -> str:
        return sha256("\n".join(texts).encode()).hexdigest()

    assert digest([caption.text for caption in benchmark()]) == BENCHMARK_SHA256
    assert digest([caption.text for caption in training_captions(1000, seed=1)]) == TRAINING_SHA256


def test_training_captions_follow_their_seed_and_mix() -> None:
    first, again, other = (training_captions(4000, seed=seed) for seed in (2, 2, 3))
    assert first == again != other
    shares = {task: sum(c.task == task for c in first) / len(first) for task in TASKS}
    mix = {"single_object": 0.06, "two_object": 0.2, "counting": 0.17, "colors": 0.07, "position": 0.22}
    assert shares == pytest.approx(mix | {"color_attr": 0.28}, abs=0.03)
    coloured = [bool(c.things[0].colour) for c in first if c.task == "position"]
    assert sum(coloured) / len(coloured) == pytest.approx(0.5, abs=0.06)
    plain = [not c.things[0].colour for c in first if c.task == "counting"]
    assert sum(plain) / len(plain) == pytest.approx(0.25, abs=0.06)
    half = [None in {thing.colour for thing in c.things} for c in first if c.task == "color_attr"]
    assert sum(half) / len(half) == pytest.approx(0.3, abs=0.06)

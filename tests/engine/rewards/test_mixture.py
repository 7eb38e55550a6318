"""Several rewards at once: weights, divisors, held-out ones, what is loaded when."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rtdmd_cli.engine.prompts.reading import PromptSet
from rtdmd_cli.engine.rewards import scoring, shapes_clip
from rtdmd_cli.engine.rewards.base import Reward, RewardEntry
from rtdmd_cli.engine.rewards.mixture import RewardMixture, open_mixture
from rtdmd_cli.engine.rewards.registry import find_reward
from rtdmd_cli.errors import DataError, NumericalError, UsageError
from tests.tiny_tuning import REWARDS, find

CPU = torch.device("cpu")
TEXTS = ["a photo of two red circles", "a photo of a blue ring left of a white cross", "a ring"]
PROMPTS = PromptSet(TEXTS, [{"length": 3 * i} for i in range(3)])
SHAPES = ("shapes-clip", "shapes-clip-heldout")


def pictures(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def opened(
    weights: dict[str, float],
    held_out: Sequence[str] = (),
    paths: dict[str, str] | None = None,
    where: str = "all",
    prompts: PromptSet = PROMPTS,
    **others: Any,
) -> RewardMixture:
    return open_mixture(weights, held_out, paths or {}, prompts, CPU, where, **({"find": find} | others))


def counting(loads: list[str]) -> Any:
    """`find_reward` whose rows note in `loads` what is loaded; the rewards are the real ones."""

    def found(name: str) -> RewardEntry:
        entry = find_reward(name)

        def load(device: torch.device, path: str | None) -> Reward:
            loads.append(name)
            return entry.load(device, path)

        return replace(entry, load=load)

    return found


def test_scores_are_undivided_and_those_trained_on() -> None:
    images, rows = pictures(), [2, 0, 0, 1]
    scores = opened({"one": 3.0, "two": 0.5, "rule": 1.0}, ("judge",)).score(images, rows).rewards
    assert list(scores) == ["one", "two", "rule"]
    for name, values in scores.items():
        expected = REWARDS[name][0].score(images, [""] * 4, [{}] * 4)
        assert torch.equal(values, expected) and values.dtype == torch.float32


def test_prompts_and_metadata_go_with_their_picture() -> None:
    mixture = opened({"prompt": 1.0})
    assert mixture.score(pictures(), [2, 0, 0, 1]).rewards["prompt"].tolist() == [6.0, 0.0, 0.0, 3.0]
    other = PromptSet(["x", "y"], [{"length": 7}, {"length": 8}])
    assert mixture.measure(pictures(2), other).rewards["prompt"].tolist() == [7.0, 8.0]


def test_long_batches_are_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, images = [0, 1, 2, 2, 1], pictures(5)
    whole = opened({"one": 1.0, "prompt": 1.0}).score(images, rows).rewards
    monkeypatch.setattr(scoring, "SCORE_BATCH", 2)
    parts = opened({"one": 1.0, "prompt": 1.0}).score(images, rows).rewards
    torch.testing.assert_close(parts, whole)


def test_a_measurement_begins_with_the_rewards_held_out() -> None:
    scores = opened({"one": 1.0}, ("judge", "rule")).measure(pictures(3), PROMPTS).rewards
    assert list(scores) == ["judge", "rule", "one"]
    assert torch.equal(scores["judge"], REWARDS["judge"][0].score(pictures(3), TEXTS, [{}] * 3))


@pytest.mark.parametrize("size", [1, 3, 4])
def test_the_pull(size: int) -> None:
    """Weighted, each over its divisor, without those that have no gradient; with the gradient by the pixels."""
    mixture = opened({"one": 3.0, "two": 0.5, "rule": 100.0}, ("judge",))
    assert mixture.differentiable == ("one", "two")
    images = pictures().requires_grad_()
    total, found = mixture.pull(images.detach(), range(4), [0, 1, 2, 0], size)
    one, two = (REWARDS[name][0].score(images, [""] * 4, [{}] * 4) for name in ("one", "two"))
    expected = 3.0 * one + 0.5 * two / 4
    torch.testing.assert_close(total, expected.detach())
    (wanted,) = torch.autograd.grad(expected.sum(), images)
    torch.testing.assert_close(found, wanted)
    assert found.abs().max() > 0
    some, of_some = mixture.pull(images.detach(), [3, 1], [0, 1], size)
    torch.testing.assert_close((some, of_some), (total[[3, 1]], found[[3, 1]]))


@pytest.mark.parametrize("where", ["all", "one"])
def test_when_rewards_are_loaded(where: str) -> None:
    """With the real CLIPs of the shapes world. "one" holds one at a time, where gradients are taken, too."""
    loads: list[str] = []
    trained, judge = SHAPES
    mixture = opened({trained: 1.0}, (judge,), where=where, find=counting(loads))
    assert loads == []
    keep = where == "all"
    mixture.check_loading()
    assert loads == [trained, judge] and set(mixture._loaded) == (set(SHAPES) if keep else set())
    loads.clear()
    first = mixture.score(pictures(), [0, 1, 2, 0]).rewards
    again = mixture.score(pictures(), [0, 1, 2, 0]).rewards
    assert loads == ([] if keep else [trained, trained])
    assert torch.equal(first[trained], again[trained])
    real = shapes_clip.load(CPU).score(pictures(), [TEXTS[i] for i in (0, 1, 2, 0)], [{}] * 4)
    torch.testing.assert_close(first[trained], real)
    loads.clear()
    mixture.pull(pictures(), range(4), [0, 1, 2, 0], 1)
    assert loads == ([] if keep else [trained]) and (keep or not mixture._loaded)


def test_one_at_a_time_holds_no_two() -> None:
    """None of those before lives on in any variable, either, when the next one is loaded."""
    held: list[int] = []
    loads: list[str] = []
    made: list[weakref.ref[Reward]] = []
    mixture = opened(dict.fromkeys(SHAPES, 1.0), where="one", find=counting(loads))
    for name, entry in mixture._entries.items():

        def load(device: torch.device, path: str | None, entry: RewardEntry = entry) -> Reward:
            held.append(sum(each() is not None for each in made))
            reward = entry.load(device, path)
            made.append(weakref.ref(reward))
            return reward

        mixture._entries[name] = replace(entry, load=load)
    mixture.check_loading(32)
    mixture.score(pictures(), [0, 0, 1, 1])
    mixture.pull(pictures(), range(4), [0, 0, 1, 1], 2)
    assert held == [0] * 6 and loads == [*SHAPES, *SHAPES, *SHAPES]


def test_rewards_are_freed_after_an_error() -> None:
    mixture = opened({"one": 1.0, "two": 1.0}, where="one")

    def fail(device: torch.device, path: str | None) -> Reward:
        raise DataError("No weights.", "Get them.")

    mixture._entries["two"] = replace(mixture._entries["two"], load=fail)
    with pytest.raises(DataError):
        mixture.pull(pictures(), range(4), [0, 1, 2, 0], 4)
    assert mixture._loaded == {}


def test_a_gradient_is_not_taken_of_a_score_that_is_not_finite() -> None:
    mixture = opened({"one": 1.0, "broken": 1.0})
    with pytest.raises(NumericalError, match=r"The reward broken is not finite for prompt 3 \('a ring'\)"):
        mixture.pull(pictures(), range(4), [2, 0, 0, 1], 2)


def test_an_unknown_reward_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="no reward `shapes-klip`") as caught:
        opened({"shapes-klip": 1.0}, find=find_reward)
    assert "shapes-clip" in caught.value.hint
    with pytest.raises(UsageError, match="no reward `pikscore`"):
        opened({"shapes-clip": 1.0}, ("pikscore",), find=find_reward)


def test_metadata_that_is_missing() -> None:
    prompts = PromptSet(TEXTS, [{"length": 1}, {}, {"length": 2}])
    for arguments in (({"prompt": 1.0}, ()), ({"one": 1.0}, ("prompt",))):
        with pytest.raises(DataError, match=r"reward prompt needs `length`.*prompt 2 has none") as caught:
            opened(*arguments, prompts=prompts)
        assert ".jsonl" in caught.value.hint
    assert opened({"one": 1.0}, prompts=prompts).weights == {"one": 1.0}


def test_paths() -> None:
    from tests.tiny_tuning import loads

    loads.clear()
    opened({"one": 1.0}, ("judge",), {"one": "/a", "judge": "b/c"}).check_loading()
    assert loads == ["one from /a", "judge from b/c"]
    with pytest.raises(UsageError, match=r"names two, which is neither trained on nor held out") as caught:
        opened({"one": 1.0}, ("judge",), {"two": "/a"})
    assert "one, judge" in caught.value.hint

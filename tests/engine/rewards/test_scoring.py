"""Pictures that a reward does not judge properly: found, named, and left out."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from rtdmd_cli.engine.judges.requirements import Metadata
from rtdmd_cli.engine.prompts.reading import PromptSet
from rtdmd_cli.engine.rewards import scoring
from rtdmd_cli.engine.rewards.scoring import Limits, Scores, require_judged, score_all
from rtdmd_cli.errors import DataError, NumericalError, RewardFailure

CPU = torch.device("cpu")
PROMPTS = PromptSet([f"prompt {i}" for i in range(6)], [{}] * 6)
IMAGES = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 4, 4) / 10
BAD = 2


@dataclass
class Picky:
    """The mean of a picture; `fail` is called, and answers, where the picture of row BAD is among them."""

    fail: Callable[[Tensor], Any]
    differentiable: bool = False
    calls: list[int] = field(default_factory=list)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Any:
        self.calls.append(len(images))
        values = images.mean(dim=(1, 2, 3))
        return self.fail(values) if f"prompt {BAD}" in prompts else values


def scored(fail: Callable[[Tensor], Any], **limits: Any) -> tuple[Picky, Scores]:
    reward = Picky(fail)
    numbers = range(11, 17)
    chosen = Limits(**({"max_share": 0.5} | limits))
    values, unjudged = score_all("mine", reward, CPU, IMAGES, PROMPTS, numbers, chosen)
    return reward, Scores({"mine": values}, tuple(unjudged))


def raising(values: Tensor) -> Tensor:
    raise KeyError("no\nsuch thing")


def slow(values: Tensor) -> Tensor:
    time.sleep(5)
    return values


def leaving(values: Tensor) -> Tensor:
    sys.exit(0)


def one_is(bad: float) -> Callable[[Tensor], Tensor]:
    return lambda values: values.where((values - BAD / 10).abs() > 1e-3, bad)


@pytest.mark.parametrize(
    ("fail", "reason"),
    [
        (one_is(math.nan), "answered nan"),
        (one_is(-math.inf), "answered -inf"),
        (raising, "raised KeyError: 'no\\nsuch thing'"),
        (lambda values: None, "answered NoneType, no tensor"),
        (lambda values: values.tolist(), "answered list, no tensor"),
        (lambda values: values.mean(), "answered torch.float32 [] instead of [1]"),
        (lambda values: values[:, None], "answered torch.float32 [1, 1] instead of [1]"),
        (slow, "took more than 0.1 s"),
        (leaving, "raised SystemExit: 0"),
        (lambda values: exec("raise GeneratorExit"), "raised GeneratorExit"),
        (lambda values: exec("raise StopIteration"), "raised StopIteration"),
    ],
)
def test_a_picture_is_named_and_the_others_keep_their_score(
    fail: Callable[[Tensor], Any], reason: str
) -> None:
    reward, scores = scored(fail, seconds=0.1)
    expected = IMAGES.mean(dim=(1, 2, 3))
    assert torch.isnan(scores.rewards["mine"][BAD])
    good = [0, 1, 3, 4, 5]
    assert scores.judged().tolist() == good
    assert torch.equal(scores.rewards["mine"][good], expected[good])
    (each,) = scores.unjudged
    assert (each.reward, each.row, each.prompt, each.reason) == ("mine", BAD, 13, reason)
    assert "mine" in str(each) and "prompt 13 ('prompt 2')" in str(each)
    assert reward.calls == ([6] if "nan" in reason or "inf" in reason else [6, 1, 1, 1, 1, 1, 1])


def test_other_numbers_are_taken_as_they_are() -> None:
    for dtype in (torch.float64, torch.float16, torch.int64):
        _, scores = scored(lambda values, dtype=dtype: values.to(dtype))
        assert not scores.unjudged and scores.rewards["mine"].dtype == torch.float32


def test_batches_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "SCORE_BATCH", 2)
    reward, scores = scored(raising)
    assert reward.calls == [2, 2, 1, 1, 2] and [each.row for each in scores.unjudged] == [BAD]


def test_a_reward_that_always_fails_is_not_asked_for_ever() -> None:
    @dataclass
    class Broken(Picky):
        def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Any:
            self.calls.append(len(images))
            raise RuntimeError("gone")

    reward = Broken(raising)
    values, unjudged = score_all("mine", reward, CPU, IMAGES, PROMPTS, range(6), Limits(max_share=0.2))
    assert values.isnan().all() and len(unjudged) == 6
    assert reward.calls == [6, 1, 1]  # 2 of 6 are more than 0.2
    assert [each.reason for each in unjudged[1:3]] == ["raised RuntimeError: gone", "was not asked any more"]


def test_errors_that_are_no_pictures_fault_are_passed_on() -> None:
    for error in (DataError("no such prompt"), MemoryError(), torch.OutOfMemoryError(), KeyboardInterrupt()):

        def fail(values: Tensor, error: BaseException = error) -> Tensor:
            raise error

        with pytest.raises(type(error)):
            scored(fail)


def test_the_share_that_may_be_left_out() -> None:
    _, scores = scored(one_is(math.nan))
    lines: list[str] = []
    rows = require_judged(scores, 1 / 6, "epoch 3", lines.append)
    assert rows.tolist() == [0, 1, 3, 4, 5]
    assert lines == [
        "epoch 3: the reward mine answered nan for prompt 13 ('prompt 2'); the picture is left out"
    ]
    with pytest.raises(RewardFailure, match=r"1 of 6 pictures got no reward in epoch 3.*prompt 13") as caught:
        require_judged(scores, 0.16, "epoch 3", lines.append)
    assert caught.value.exit_code == 5 and isinstance(caught.value, NumericalError)
    assert "rewards check mine" in caught.value.hint and len(lines) == 2


def test_a_picture_counts_once_however_many_rewards_fail() -> None:
    one, two = torch.tensor([1.0, math.nan, 3.0, 4.0]), torch.tensor([1.0, math.nan, math.nan, 4.0])
    assert Scores({"one": one, "two": two}).judged().tolist() == [0, 3]


def test_a_reward_that_fills_the_memory_is_given_fewer_pictures() -> None:
    """Also where another micro-batch of the training would change nothing."""

    def full_above_two(values: Tensor) -> Tensor:
        if len(values) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return values

    reward, scores = scored(full_above_two)
    assert reward.calls == [6, 3, 1, 1, 1, 1, 1, 1]
    assert not scores.unjudged and torch.equal(scores.rewards["mine"], IMAGES.mean(dim=(1, 2, 3)))


def test_a_gpu_that_fails_is_no_fault_of_a_picture() -> None:
    def fallen(values: Tensor) -> Tensor:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    with pytest.raises(torch.AcceleratorError):
        scored(fallen)

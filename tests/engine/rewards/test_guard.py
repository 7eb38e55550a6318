"""What a reward's code may do to its caller: nothing."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rtdmd_cli.engine.prompts.reading import PromptSet
from rtdmd_cli.engine.rewards import guard
from rtdmd_cli.engine.rewards.base import RewardEntry
from rtdmd_cli.engine.rewards.guard import (
    Failed,
    TooSlow,
    answer,
    answer_with_gradient,
    guarded,
    load_reward,
    picture_gradient,
    time_limit,
)
from rtdmd_cli.engine.rewards.mixture import RewardMixture, open_mixture
from rtdmd_cli.errors import DataError, RewardFailure, UsageError

CPU = torch.device("cpu")
TEXTS, KNOWN = ["a ring", "a star"], [{"n": [1]}, {"n": [2]}]


def pictures() -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Mine:
    """The mean of a picture, after `act`, whose answer is given in its place where it has one."""

    differentiable = True

    def __init__(self, act: Callable[[Tensor, Sequence[Any]], Any]) -> None:
        self.act = act

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Any:
        values = images.mean(dim=(1, 2, 3))
        given = self.act(images, metadata)
        return values if given is None else given


def global_state() -> tuple[Any, ...]:
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # type: ignore[index,union-attr]
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )


def meddle(images: Tensor, metadata: Sequence[Any]) -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    torch.set_grad_enabled(not torch.is_grad_enabled())
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.use_deterministic_algorithms(True)
    images.data.zero_()
    metadata[0]["n"].append(3)


def test_what_is_global_is_as_before() -> None:
    before, images = global_state(), pictures()
    reward, known = Mine(meddle), [{"n": [1]}, {"n": [2]}]
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            asked = (gradient, *before[:3], *before[4:])
            answer_with_gradient(reward, images, TEXTS, known, 10)
            answer(reward, images.clone(), TEXTS, known, 10)
            now = global_state()
            assert (now[3], *now[:3], *now[4:]) == asked
    with pytest.raises(Failed, match="raised ValueError"):  # after an error as well
        guarded(lambda: (meddle(images.clone(), [{"n": []}]), int("x")), 10)
    assert global_state() == before
    assert torch.equal(images, pictures()) and known == KNOWN


def test_what_is_printed_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    def talk(images: Tensor, metadata: Sequence[Any]) -> None:
        print("by print")
        os.write(1, b"by the process\n")
        sys.__stdout__.write("kept from before\n")  # type: ignore[union-attr]

    print("data")
    answer(Mine(talk), pictures(), TEXTS, KNOWN, 10)
    print("more data")
    out, err = capfd.readouterr()
    assert out == "data\nmore data\n"
    assert {"by print", "by the process", "kept from before"} <= set(err.splitlines())


def test_a_closed_stdout_is_no_obstacle() -> None:
    kept = os.dup(1)
    os.close(1)
    try:
        assert guarded(lambda: 3, 10) == 3
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def test_one_that_catches_everything_is_reminded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "AGAIN", 0.05)
    caught: list[BaseException] = []

    def stubborn() -> None:
        for _ in range(3):
            try:
                time.sleep(5)
            except BaseException as error:  # noqa: PERF203
                caught.append(error)
        time.sleep(5)

    began = time.monotonic()
    with pytest.raises(Failed, match=r"took more than 0\.05 s"):
        guarded(stubborn, 0.05)
    assert len(caught) == 3 and time.monotonic() - began < 5


def test_a_time_limit_ends_with_its_block() -> None:
    with time_limit(0.05):
        pass
    time.sleep(0.1)
    with pytest.raises(TooSlow), time_limit(0.05):
        time.sleep(5)
    with time_limit(None):
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda images, known: sys.exit(0), "raised SystemExit: 0"),
        (lambda images, known: exec("raise GeneratorExit"), "raised GeneratorExit"),
        (lambda images, known: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (lambda images, known: 3, "answered int, no tensor"),
        (lambda images, known: images, r"answered torch.float32 \[\d, 3, 8, 8\] instead of"),
        (lambda images, known: images.mean((1, 2, 3)).detach(), "has no gradient to the pictures"),
        (
            lambda images, known: torch.ones(len(images), requires_grad=True) * 2,
            "has no gradient to the pictures",
        ),
        (lambda images, known: torch.ones(len(images), dtype=torch.int64), "answered torch.int64"),
        (lambda images, known: images.mean((1, 2, 3)).sub(images.mean((1, 2, 3))).sqrt(), "not finite"),
    ],
)
def test_a_gradient_that_is_claimed_and_not_there(
    act: Callable[[Tensor, Sequence[Any]], Any], reason: str
) -> None:
    """One probe before anything is trained: exit code 4."""
    with pytest.raises(Failed, match=reason):
        picture_gradient(Mine(act), pictures(), TEXTS, KNOWN, 10)
    mixture = mixture_of(Mine(act))
    mixture.check_loading()
    with pytest.raises(DataError, match=rf"The reward my:Own .*{reason}") as caught:
        mixture.check_loading(8)
    assert "rtdmd rewards check my:Own" in caught.value.hint


def mixture_of(reward: Any, *others: Any) -> RewardMixture:
    rows = {f"my:Own{number or ''}": each for number, each in enumerate((reward, *others))}

    def find(name: str) -> RewardEntry:
        return RewardEntry(name, "Mine.", 0, 1, True, (), lambda device, path: rows[name])

    return open_mixture(dict.fromkeys(rows, 1.0), (), {}, PromptSet(TEXTS, KNOWN), CPU, "all", find)


def test_a_right_gradient_passes_and_is_right() -> None:
    mixture_of(Mine(lambda images, known: None)).check_loading(8)
    gradient = picture_gradient(Mine(lambda images, known: None), pictures(), TEXTS, KNOWN, None)
    assert torch.equal(gradient, torch.full((2, 3, 8, 8), 1 / 192))


def test_one_that_fails_where_its_gradient_is_taken() -> None:
    """In the middle of a training: exit code 5, and what was trained is saved."""
    images = pictures()
    mixture = mixture_of(Mine(lambda images, known: sys.exit(0) if images.requires_grad else None))
    assert mixture.score(images, [0, 1]).unjudged == ()
    with pytest.raises(
        RewardFailure, match=r"my:Own raised SystemExit: 0 \(test_guard.py.*gradient is taken"
    ):
        mixture.pull(images, range(2), [0, 1], 2)


def test_a_reward_does_not_change_the_pictures_of_the_next() -> None:
    def black(images: Tensor, metadata: Sequence[Any]) -> None:
        images.data.zero_()

    images = pictures()
    mixture = mixture_of(Mine(black), Mine(lambda images, known: None))
    total, _ = mixture.pull(images, range(2), [0, 1], 2)
    torch.testing.assert_close(total, 2 * pictures().mean((1, 2, 3)))
    assert torch.equal(images, pictures())
    found = mixture.score(images, [0, 1]).rewards
    assert torch.equal(found["my:Own"], found["my:Own1"])


def test_a_constructor_that_fails() -> None:
    def load(device: torch.device, path: str | None) -> Any:
        raise SystemExit(0)

    row = RewardEntry("my:Own", "Mine.", 0, 1, True, (), load)
    with pytest.raises(DataError, match=r"my:Own can't be built: it raised SystemExit: 0 \(test_guard.py"):
        load_reward(row, CPU, None)

    def wrong(device: torch.device, path: str | None) -> Any:
        raise UsageError("no")

    with pytest.raises(UsageError, match="no"):
        load_reward(RewardEntry("my:Own", "Mine.", 0, 1, True, (), wrong), CPU, None)


def test_the_precision_of_products_comes_back_whichever_setting_was_used() -> None:
    """torch's newer setting makes its older one unreadable, which the training reads."""
    before = torch.get_float32_matmul_precision()

    def own() -> float:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        return 1.0

    seed = torch.initial_seed()
    assert guarded(own, 5.0) == guarded(own, 5.0) == 1.0
    assert torch.get_float32_matmul_precision() == before and torch.initial_seed() == seed


@pytest.mark.parametrize("words", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_full_memory_in_other_words_is_no_fault_of_the_reward(words: str) -> None:
    def full() -> None:
        raise RuntimeError(words)

    with pytest.raises(RuntimeError, match=words):
        guarded(full, 5.0)

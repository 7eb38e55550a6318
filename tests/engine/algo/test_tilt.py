"""The tilt of distribution matching against numpy, counts and the fixed point it claims."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rtdmd_cli.engine.algo.advantages import group_advantages
from rtdmd_cli.engine.algo.tilt import effective_share, systematic_draw, tilt_weights

REWARD = torch.tensor([0.5, -1.25, 2.0, 0.0, -3.0])


@pytest.mark.parametrize("tilt", [0.0, 0.7, 40.0])
def test_weights_are_the_exponential_of_the_negative_reward(tilt: float) -> None:
    expected = np.exp(-tilt * REWARD.double().numpy())
    weights = tilt_weights(REWARD, tilt)
    assert weights.dtype == torch.float64 and not weights.requires_grad
    np.testing.assert_allclose(weights.numpy(), expected / expected.sum(), rtol=1e-12)


def test_a_constant_added_to_every_reward_changes_nothing() -> None:
    torch.testing.assert_close(tilt_weights(REWARD + 3, 2.0), tilt_weights(REWARD, 2.0), rtol=1e-5, atol=0)
    assert tilt_weights(REWARD * 1e4, 10.0).isfinite().all()


@pytest.mark.parametrize(
    ("reward", "tilt"),
    [
        (torch.zeros(0), 1.0),
        (torch.zeros(2, 1), 1.0),
        (torch.tensor([0.0, math.nan]), 1.0),
        (torch.tensor([0.0, math.inf]), 1.0),
        (torch.zeros(2), -1.0),
        (torch.zeros(2), math.nan),
    ],
)
def test_what_has_no_weights(reward: torch.Tensor, tilt: float) -> None:
    with pytest.raises(ValueError, match=r"expected finite rewards|tilt must be"):
        tilt_weights(reward, tilt)


def test_the_effective_share() -> None:
    assert effective_share(torch.full((7,), 0.3)) == pytest.approx(1)
    assert effective_share(torch.tensor([0.0, 2.0, 0.0, 0.0])) == pytest.approx(1 / 4)
    assert effective_share(torch.tensor([1.0, 3.0])) == pytest.approx(16 / 20)


def test_equal_weights_give_every_index_once() -> None:
    for u in (0.001, 0.5, 0.999):
        assert systematic_draw(torch.full((6,), 1 / 6, dtype=torch.float64), 6, u).tolist() == list(range(6))


@pytest.mark.parametrize("count", [1, 4, 50])
def test_an_index_is_drawn_as_often_as_its_weight_says(count: int) -> None:
    """Up to rounding in a draw, exactly on average over u."""
    weights = tilt_weights(REWARD, 0.6)
    total = torch.zeros(len(weights), dtype=torch.float64)
    for u in torch.arange(0, 1, 1 / 256).tolist():
        drawn = systematic_draw(weights, count, u)
        counts = torch.bincount(drawn, minlength=len(weights))
        assert drawn.tolist() == sorted(drawn.tolist()) and len(drawn) == count
        assert (counts - count * weights).abs().max() < 1
        total += counts / 256
    torch.testing.assert_close(total, count * weights, rtol=0, atol=0.02)


def test_an_index_without_weight_is_never_drawn() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    for u in (0.0, 0.25, 0.9999999):
        assert set(systematic_draw(weights, 8, u).tolist()) == {1, 3}


@pytest.mark.parametrize(("count", "u"), [(0, 0.5), (3, 1.0), (3, -0.1), (3, math.nan)])
def test_what_cannot_be_drawn(count: int, u: float) -> None:
    with pytest.raises(ValueError, match="expected count > 0"):
        systematic_draw(torch.ones(3), count, u)


def test_at_rest_the_generator_is_the_tilted_teacher() -> None:
    """A generator that is the teacher, tilted by exp(tilt r): drawn again, it is the teacher."""
    source, tilt = torch.Generator().manual_seed(0), 0.8
    teacher, reward = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([1.0, -1.0, 0.25])
    tilted = teacher * (tilt * reward).exp()
    samples = torch.multinomial(tilted, 200_000, replacement=True, generator=source)
    again = samples[systematic_draw(tilt_weights(reward[samples], tilt), 200_000, 0.5)]
    found = torch.bincount(again, minlength=3) / len(again)
    torch.testing.assert_close(found, teacher, rtol=0, atol=5e-3)


@pytest.mark.parametrize("tilt", [0.0, 0.8])
def test_matching_to_what_was_drawn_leads_to_the_tilted_teacher(tilt: float) -> None:
    """Teacher N(0, 1), generator N(m, 1), reward x: exp(tilt x) makes the teacher N(tilt, 1).

    The fake score of samples drawn again is that of a normal around their mean, the teacher's of one around 0; the
    generator follows the difference. The advantage of x is x - m here: one group, standard deviation 1.
    """
    source, m = torch.Generator().manual_seed(0), torch.tensor(-1.0)
    for _ in range(120):
        x = m + torch.randn(4096, generator=source)
        advantages = group_advantages({"x": x}, {"x": 1.0}, torch.zeros(4096, dtype=torch.int64))
        drawn = x[systematic_draw(tilt_weights(advantages, tilt), 4096, 0.5)]
        m = m - 0.1 * (drawn.mean() - 0.0)
    assert float(m) == pytest.approx(tilt, abs=0.05)

import statistics

import pytest
import torch

from rtdmd_cli.engine.algo.advantages import group_advantages, weighted_advantages

GROUPS = ["cat", "dog", "cat", "dog", "cat", "dog"]
REWARDS = {
    "clip": torch.tensor([0.2, 0.9, 0.4, 0.1, 0.3, 0.8]),
    "aesthetic": torch.tensor([5.0, 6.5, 5.5, 4.0, 5.9, 6.1]),
}
WEIGHTS = {"clip": 1.0, "aesthetic": 0.25}


def by_hand(rewards: dict[str, list[float]], weights: dict[str, float], groups: list[str]) -> list[float]:
    total = [0.0] * len(groups)
    for name, values in rewards.items():
        std = statistics.pstdev(values) + 1e-4
        for i, group in enumerate(groups):
            peers = [value for value, other in zip(values, groups, strict=True) if other == group]
            total[i] += weights[name] * (values[i] - statistics.fmean(peers)) / std
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_advantages_are_those_computed_by_hand(dtype: torch.dtype) -> None:
    rewards = {name: value.to(dtype) for name, value in REWARDS.items()}
    total = by_hand({name: value.tolist() for name, value in rewards.items()}, WEIGHTS, GROUPS)
    std = statistics.pstdev(total) + 1e-4
    expected = torch.tensor([(value - statistics.fmean(total)) / std for value in total], dtype=dtype)
    actual = group_advantages(rewards, WEIGHTS, GROUPS)
    assert actual.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    before = weighted_advantages(rewards, WEIGHTS, GROUPS)
    torch.testing.assert_close(before, torch.tensor(total, dtype=torch.float64), rtol=1e-13, atol=1e-13)


def test_groups_may_be_numbers_in_any_order() -> None:
    numbers = torch.tensor([7, 3, 7, 3, 7, 3])
    assert torch.equal(
        group_advantages(REWARDS, WEIGHTS, numbers), group_advantages(REWARDS, WEIGHTS, GROUPS)
    )


def test_a_group_of_equal_rewards_gets_zero() -> None:
    rewards = {"clip": torch.tensor([0.1, 0.9, 0.1, 0.2, 0.1, 0.4])}
    before = weighted_advantages(rewards, {"clip": 1.0}, GROUPS)
    assert before[::2].abs().max() < 1e-12
    assert before[1::2].abs().min() > 0.1
    assert group_advantages(rewards, {"clip": 1.0}, GROUPS)[::2].abs().max() < 1e-12


def test_equal_rewards_everywhere_give_no_advantage_from_rounding() -> None:
    rewards = {"clip": torch.full((24,), 0.1), "aesthetic": torch.full((24,), 5.3)}
    groups = torch.arange(24) // 8
    assert group_advantages(rewards, WEIGHTS, groups).abs().max() < 1e-4


def test_whitened_over_all_images() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = {"clip": torch.rand(240, generator=generator)}
    advantages = group_advantages(rewards, {"clip": 3.0}, torch.arange(240) // 24)
    assert abs(advantages.mean().item()) < 1e-6
    assert advantages.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_scale_and_offset_of_a_reward_do_not_matter() -> None:
    moved = {"clip": 100 * REWARDS["clip"].double() - 7}
    plain = {"clip": REWARDS["clip"].double()}
    weights = {"clip": 1.0}
    torch.testing.assert_close(
        group_advantages(moved, weights, GROUPS),
        group_advantages(plain, weights, GROUPS),
        rtol=1e-3,
        atol=1e-3,
    )


def test_clipped_at_both_ends() -> None:
    reward = torch.zeros(200)
    reward[3], reward[150] = 1.0, -1.0
    groups = torch.zeros(200, dtype=torch.int64)
    advantages = group_advantages({"clip": reward}, {"clip": 1.0}, groups)
    assert advantages[3] == 5 and advantages[150] == -5
    assert group_advantages({"clip": reward}, {"clip": 1.0}, groups, clip=2.0).max() == 2


def test_a_single_image_of_a_prompt_gets_zero() -> None:
    before = weighted_advantages({"clip": torch.tensor([0.3, 0.1, 0.5])}, {"clip": 1.0}, ["a", "b", "b"])
    assert before[0] == 0 and before[1] < 0 < before[2]


def test_a_reward_that_is_not_finite_is_not_hidden() -> None:
    reward = torch.tensor([0.1, float("nan"), 0.2, 0.3])
    assert group_advantages({"clip": reward}, {"clip": 1.0}, ["a", "a", "b", "b"]).isnan().all()


def test_no_gradient() -> None:
    reward = torch.rand(6, requires_grad=True)
    assert not group_advantages({"clip": reward}, {"clip": 1.0}, GROUPS).requires_grad


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="same rewards"):
        group_advantages(REWARDS, {"clip": 1.0}, GROUPS)
    with pytest.raises(ValueError, match="same rewards"):
        group_advantages({}, {}, GROUPS)
    with pytest.raises(ValueError, match="'clip' has shape"):
        group_advantages({"clip": torch.rand(5)}, {"clip": 1.0}, GROUPS)
    with pytest.raises(ValueError, match="'clip' has shape"):
        group_advantages({"clip": torch.rand(0)}, {"clip": 1.0}, [])
    with pytest.raises(ValueError, match="clip must be positive"):
        group_advantages(REWARDS, WEIGHTS, GROUPS, clip=0.0)

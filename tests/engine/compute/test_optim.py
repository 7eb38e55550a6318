"""Optimisers, clipping, the moving average and saved states, against torch's own and closed forms."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from rtdmd_cli.engine.compute import optim
from rtdmd_cli.engine.storage import checkpoint
from rtdmd_cli.errors import DataError, EnvironmentFailure, NumericalError

NAMES = ["x.lora_A", "x.lora_B"]


def parameters(side: int = 4) -> list[tuple[str, Parameter]]:
    random = torch.Generator().manual_seed(0)
    return [(name, Parameter(torch.randn(side, side, generator=random))) for name in NAMES]


def adamw(params: list[tuple[str, Parameter]]) -> torch.optim.Optimizer:
    return optim.build_optimizer(params, 0.1, (0.9, 0.999), 1e-8, 0.01)


def train(
    optimizer: torch.optim.Optimizer, params: list[tuple[str, Parameter]], first: int, last: int
) -> None:
    for step in range(first, last):
        random = torch.Generator().manual_seed(step)
        for _, parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=random)
        optimizer.step()


def set_gradients(params: list[tuple[str, Parameter]], *values: float) -> None:
    for (_, parameter), value in zip(params, values, strict=True):
        parameter.grad = torch.full_like(parameter, value)


def gradients(params: list[tuple[str, Parameter]]) -> list[Tensor]:
    return [parameter.grad.clone() for _, parameter in params if parameter.grad is not None]


def test_the_first_step_of_adamw_by_hand() -> None:
    params = parameters()
    before = [parameter.detach().clone() for _, parameter in params]
    set_gradients(params, 3.0, -0.5)
    optimizer = adamw(params)
    assert optimizer.defaults["fused"]  # six times as fast on the CPU
    optimizer.step()
    for (_, parameter), old, sign in zip(params, before, (1.0, -1.0), strict=True):
        assert torch.allclose(parameter.detach(), old * (1 - 0.1 * 0.01) - 0.1 * sign, atol=1e-6)


def test_cosine_decay() -> None:
    rates = [optim.learning_rate_at(step, 0.4, 0, 4) for step in range(6)]
    assert rates == pytest.approx([0.4, 0.4 * (2 + 2**0.5) / 4, 0.2, 0.4 * (2 - 2**0.5) / 4, 0.0, 0.0])
    assert optim.learning_rate_at(1, 0.4, 4, 4) == pytest.approx(0.5 * rates[1])  # warm-up and fall multiply


def test_warm_up() -> None:
    rates = [optim.learning_rate_at(step, 0.4, 4) for step in range(6)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert optim.learning_rate_at(0, 0.4, 0) == 0.4
    optimizer = adamw(parameters())
    optim.set_learning_rate(optimizer, 0.7)
    assert [group["lr"] for group in optimizer.param_groups] == [0.7]


def checked_and_clipped(params: Any, max_norm: float, iteration: int) -> float:
    """As before a role moves: the norm is read, checked, and the gradients are clipped by it."""
    norm = optim.gradient_norm(params)
    optim.require_finite_norm(float(norm), params, iteration)
    optim.clip(params, max_norm, norm)
    return float(norm)


@pytest.mark.parametrize("max_norm", [1.0, 1e6])
def test_clipping_is_that_of_torch(max_norm: float) -> None:
    params = parameters()
    set_gradients(params, 3.0, -4.0)
    twins = copy.deepcopy([parameter for _, parameter in params])
    for twin, (_, parameter) in zip(twins, params, strict=True):
        twin.grad = parameter.grad.clone() if parameter.grad is not None else None
    expected = torch.nn.utils.clip_grad_norm_(twins, max_norm)
    assert checked_and_clipped(params, max_norm, 1) == pytest.approx(float(expected)) == pytest.approx(20.0)
    for twin, gradient in zip(twins, gradients(params), strict=True):
        assert twin.grad is not None
        assert torch.equal(gradient, twin.grad)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "nan"), (float("inf"), "infinite")])
def test_the_first_bad_gradient_is_named_and_nothing_is_changed(value: float, word: str) -> None:
    params = [*parameters(), ("third", Parameter(torch.zeros(2)))]
    set_gradients(params, 5.0, 1.0, float("nan"))
    assert params[1][1].grad is not None
    params[1][1].grad[2, 3] = value
    before = gradients(params)
    with pytest.raises(
        NumericalError, match=rf"gradient of x\.lora_B holds {word} values at iteration 17"
    ) as caught:
        checked_and_clipped(params, 1.0, 17)
    assert caught.value.exit_code == 5
    for gradient, old in zip(gradients(params), before, strict=True):
        assert torch.equal(gradient.nan_to_num(), old.nan_to_num())


def test_a_norm_beyond_float32_is_an_error_too() -> None:
    params = parameters()
    set_gradients(params, 1e38, 3e38)
    with pytest.raises(NumericalError, match="norm of all gradients exceeds"):
        checked_and_clipped(params, 1.0, 2)


def test_no_gradient_at_all_is_an_error_and_a_single_missing_one_is_not() -> None:
    params = parameters()
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        checked_and_clipped(params, 1.0, 0)
    params[1][1].grad = torch.ones(4, 4)
    assert checked_and_clipped(params, 100.0, 0) == pytest.approx(4.0)


def test_check_finite() -> None:
    optim.check_finite("fake loss", torch.tensor([1.0, -3e38]), 1)
    with pytest.raises(NumericalError, match="fake loss is nan at iteration 3"):
        optim.check_finite("fake loss", torch.tensor(float("nan")), 3)
    with pytest.raises(NumericalError, match="w holds infinite values at iteration 4"):
        optim.check_finite("w", torch.tensor([0.0, float("-inf")]), 4)


def test_ema_is_the_weighted_sum_of_all_weights() -> None:
    weight = Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
    average = optim.ema_start([("w", weight)], torch.float32)
    assert average["w"].dtype == torch.float32
    assert average["w"].data_ptr() != weight.data_ptr()
    for value in (2.0, 4.0):
        weight.data.fill_(value)
        optim.ema_update(average, [("w", weight)], 0.9)
    assert float(average["w"]) == pytest.approx(0.81 * 1 + 0.1 * 0.9 * 2 + 0.1 * 4)
    assert not average["w"].requires_grad


def test_a_bf16_average_loses_small_changes_as_the_published_one() -> None:
    """Near 1 bf16 steps by 2^-7 upwards: a change that a float32 average takes in is lost, a larger one is rounded."""
    for change, expected in ((0.01, 1.0), (0.1, 1 + 2**-7)):
        weight = Parameter(torch.tensor([1.0 + change]).bfloat16())
        average = {"w": torch.ones(1).bfloat16()}
        optim.ema_update(average, [("w", weight)], 0.9)
        assert average["w"].dtype == torch.bfloat16 and float(average["w"]) == expected
        exact = {"w": torch.ones(1)}
        optim.ema_update(exact, [("w", weight)], 0.9)
        assert float(exact["w"]) == pytest.approx(1 + 0.1 * (float(weight) - 1), abs=1e-6) != expected
    assert optim.ema_start([("w", weight)])["w"].dtype == torch.bfloat16


def test_ema_refuses_other_names_and_half_precision() -> None:
    with pytest.raises(ValueError, match="differ"):
        optim.ema_update({"a": torch.zeros(1)}, [("b", torch.zeros(1))], 0.9)
    with pytest.raises(ValueError, match="float32"):
        optim.ema_update({"a": torch.zeros(1).half()}, [("a", torch.zeros(1))], 0.9)


def test_ema_decay() -> None:
    assert optim.ema_decay_at(0, 0.904, False) == 0.904
    assert [optim.ema_decay_at(n, 0.904, True) for n in (0, 8, 1000)] == pytest.approx([0.1, 0.5, 0.904])


def through_a_checkpoint(optimizer: torch.optim.Optimizer, folder: Path) -> checkpoint.Checkpoint:
    tensors, state = optim.optimizer_tensors(optimizer, NAMES)
    path = checkpoint.save_checkpoint(folder, 1, {"optimizer": tensors}, {"optimizer": state}, 1, {})
    return checkpoint.load_checkpoint(path)


def check_exact_resume(choice: optim.Choice, side: int, folder: Path) -> dict[str, Tensor]:
    """k steps, a checkpoint, a fresh optimiser, more steps: the same bits as without the break."""

    def build(params: list[tuple[str, Parameter]]) -> torch.optim.Optimizer:
        return optim.build_optimizer(params, 0.1, (0.9, 0.999), 1e-8, 0.01, choice)

    params = parameters(side)
    optimizer = build(params)
    train(optimizer, params, 0, 3)
    loaded = through_a_checkpoint(optimizer, folder)
    fresh_params = [(name, Parameter(parameter.detach().clone())) for name, parameter in params]
    fresh = build(fresh_params)
    optim.load_optimizer(fresh, NAMES, loaded.tensors["optimizer"], loaded.state["optimizer"])
    train(optimizer, params, 3, 5)
    train(fresh, fresh_params, 3, 5)
    for (_, expected), (_, found) in zip(params, fresh_params, strict=True):
        assert torch.equal(expected, found)
    expected_tensors, expected_state = optim.optimizer_tensors(optimizer, NAMES)
    found_tensors, found_state = optim.optimizer_tensors(fresh, NAMES)
    assert expected_state == found_state
    assert expected_tensors.keys() == found_tensors.keys()
    for name, tensor in expected_tensors.items():
        assert tensor.dtype == found_tensors[name].dtype
        assert torch.equal(tensor, found_tensors[name]), name
    return loaded.tensors["optimizer"]


def test_adamw_resumes_bit_for_bit(tmp_path: Path) -> None:
    tensors = check_exact_resume("adamw", 4, tmp_path)
    assert sorted(tensors)[:3] == ["x.lora_A/exp_avg", "x.lora_A/exp_avg_sq", "x.lora_A/step"]


def test_adamw8bit_resumes_bit_for_bit(tmp_path: Path) -> None:
    tensors = check_exact_resume("adamw8bit", 64, tmp_path)
    assert tensors["x.lora_A/state1"].dtype == torch.uint8
    assert "x.lora_A/absmax2" in tensors


def test_adamw8bit_keeps_small_states_in_float32(tmp_path: Path) -> None:
    """And moves like AdamW while its states are exact."""
    tensors = check_exact_resume("adamw8bit", 32, tmp_path)
    assert tensors["x.lora_A/state1"].dtype == torch.float32
    ours, theirs = parameters(32), parameters(32)
    for params, choice in ((ours, "adamw8bit"), (theirs, "adamw")):
        train(optim.build_optimizer(params, 0.1, (0.9, 0.99), 1e-8, 0.01, choice), params, 0, 5)  # type: ignore[arg-type]
    for (_, found), (_, expected) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_adamw8bit_follows_adamw() -> None:
    """Large states in 8 bits: 20 steps, relative difference of the way that was gone under 5 %."""
    ours, theirs, start = parameters(64), parameters(64), parameters(64)
    for params, choice in ((ours, "adamw8bit"), (theirs, "adamw")):
        train(optim.build_optimizer(params, 0.01, (0.9, 0.999), 1e-8, 0.0, choice), params, 0, 20)  # type: ignore[arg-type]
    for (_, found), (_, expected), (_, old) in zip(ours, theirs, start, strict=True):
        assert 0 < float((found - expected).norm() / (expected - old).norm()) < 0.05


def test_paged_states_need_a_gpu() -> None:
    with pytest.raises(EnvironmentFailure, match="paged_adamw8bit runs on cuda alone") as caught:
        optim.build_optimizer(parameters(), 0.1, (0.9, 0.999), 1e-8, 0.0, "paged_adamw8bit")
    assert caught.value.exit_code == 3 and "adamw8bit" in caught.value.hint


def test_an_optimiser_that_never_moved_resumes_as_such() -> None:
    tensors, state = optim.optimizer_tensors(adamw(parameters()), NAMES)
    assert tensors == {}
    params = parameters()
    moved = adamw(params)
    train(moved, params, 0, 1)
    optim.load_optimizer(moved, NAMES, tensors, state)
    assert not moved.state


def test_loading_is_strict_and_changes_nothing_when_it_fails() -> None:
    params = parameters()
    source = adamw(params)
    train(source, params, 0, 2)
    tensors, state = optim.optimizer_tensors(source, NAMES)
    target = adamw(parameters())
    less = {name: tensor for name, tensor in tensors.items() if name != "x.lora_B/exp_avg"}
    more = tensors | {"x.lora_C/exp_avg": torch.zeros(1)}
    other_shape = tensors | {"x.lora_B/exp_avg": torch.zeros(2, 8)}
    for found, reason in (
        (less, r"lacks tensors: x\.lora_B/exp_avg"),
        (more, r"unexpected tensors: x\.lora_C/exp_avg"),
        (other_shape, r"x\.lora_B/exp_avg has shape \[2, 8\], not \[4, 4\]"),
    ):
        with pytest.raises(DataError, match=reason):
            optim.load_optimizer(target, NAMES, found, state)
    with pytest.raises(DataError, match=r"lacks parameters: y"):
        optim.load_optimizer(target, ["x.lora_A", "y"], tensors, state)
    with pytest.raises(DataError, match="is SGD, this one is AdamW"):
        optim.load_optimizer(target, NAMES, tensors, state | {"optimizer": "SGD"})
    assert not target.state
    with pytest.raises(ValueError, match="2 parameters"):
        optim.optimizer_tensors(source, ["x.lora_A"])


def test_what_json_cannot_hold_is_refused() -> None:
    params = parameters()
    optimizer = adamw(params)
    optimizer.state[params[0][1]] = {"history": [1, 2]}
    with pytest.raises(TypeError, match="history of x.lora_A"):
        optim.optimizer_tensors(optimizer, NAMES)

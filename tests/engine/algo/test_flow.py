import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rtdmd_cli.engine.algo.flow import (
    cfg,
    cps_logprob,
    cps_mean_std,
    cps_step,
    guidance_at,
    to_eps,
    to_x0,
)

SHAPE = (3, 2, 4, 5)
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
fast = settings(max_examples=40, deadline=None, derandomize=True)
level = st.floats(0.0, 1.0)


def draws(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=dtype) for _ in range(count)]


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected.to(dtype), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@DTYPES
@given(sigma=level)
@fast
def test_x0_and_eps_invert_the_flow(dtype: torch.dtype, sigma: float) -> None:
    x0, eps = draws(2, dtype=dtype)
    x, v = (1 - sigma) * x0 + sigma * eps, eps - x0
    assert_close(to_x0(x, sigma, v), x0, dtype)
    assert_close(to_eps(x, sigma, v), eps, dtype)


@DTYPES
@given(levels=st.tuples(level, level))
@fast
def test_eta_zero_is_the_euler_step(dtype: torch.dtype, levels: tuple[float, float]) -> None:
    low, high = sorted(levels)
    x, v, noise = draws(3, dtype=dtype)
    assert_close(cps_step(x, v, high, low, 0.0, noise), x + (low - high) * v, dtype)
    assert torch.count_nonzero(cps_mean_std(x, v, high, low, 0.0)[1]) == 0


@DTYPES
@given(levels=st.tuples(level, level))
@fast
def test_eta_one_renoises_x0(dtype: torch.dtype, levels: tuple[float, float]) -> None:
    low, high = sorted(levels)
    x, v, noise = draws(3, dtype=dtype)
    expected = (1 - low) * (x - high * v) + low * noise
    assert_close(cps_step(x, v, high, low, 1.0, noise), expected, dtype)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.9, 1.0])
def test_last_step_returns_x0_whatever_the_noise(eta: float) -> None:
    x, v, noise = draws(3, dtype=torch.float32)
    assert torch.equal(cps_step(x, v, 0.5, 0.0, eta, 1e6 * noise), to_x0(x, 0.5, v))


@given(levels=st.tuples(level, level), eta=level)
@fast
def test_cps_preserves_the_coefficients_of_the_flow(levels: tuple[float, float], eta: float) -> None:
    """With the true x0 and eps, x' holds (1 - sigma') of the picture and sigma' of noise in all."""
    low, high = sorted(levels)
    one, zero = torch.ones(SHAPE, dtype=torch.float64), torch.zeros(SHAPE, dtype=torch.float64)
    picture, _ = cps_mean_std((1 - high) * one, -one, high, low, eta)  # x0 = 1, eps = 0
    kept, std = cps_mean_std(high * one, one, high, low, eta)  # x0 = 0, eps = 1
    torch.testing.assert_close(picture, (1 - low) * one, rtol=0, atol=1e-14)
    torch.testing.assert_close((kept.square() + std.square()).sqrt(), low * one, rtol=0, atol=1e-14)
    angle = (low * math.sin(eta * math.pi / 2)) * one + zero
    torch.testing.assert_close(std.expand(SHAPE), angle, rtol=0, atol=1e-14)


def test_samples_of_a_step_have_the_stated_mean_and_std() -> None:
    generator = torch.Generator().manual_seed(3)
    x, v = torch.full((1, 1, 400, 500), 0.7), torch.full((1, 1, 400, 500), -0.4)
    noise = torch.randn(x.shape, generator=generator)
    sample = cps_step(x, v, 0.9, 0.75, 0.9, noise)
    x0, eps = 0.7 + 0.9 * 0.4, 0.7 - 0.1 * 0.4
    mean, std = 0.25 * x0 + 0.75 * math.cos(0.45 * math.pi) * eps, 0.75 * math.sin(0.45 * math.pi)
    count = sample.numel()
    assert abs(sample.mean().item() - mean) < 4 * std / math.sqrt(count)
    assert abs(sample.std().item() - std) < 4 * std / math.sqrt(2 * count)


def test_levels_may_be_float_scalar_tensor_or_per_sample() -> None:
    x, v, noise = draws(3, dtype=torch.float32)
    per_sample = (torch.full((3,), 0.9), torch.full((3,), 0.75))
    expected = cps_step(x, v, *per_sample, 0.9, noise)
    assert torch.equal(cps_step(x, v, 0.9, 0.75, 0.9, noise), expected)
    assert torch.equal(cps_step(x, v, torch.tensor(0.9), 0.75, 0.9, noise), expected)
    for scalar in (0.75, torch.tensor(0.75)):
        assert cps_mean_std(x, v, 0.9, scalar, 0.9)[1].shape == (3, 1, 1, 1)


def test_every_sample_has_its_own_level() -> None:
    x, v, noise = draws(3)
    sigma, sigma_next = torch.tensor([0.9, 0.6, 0.3]), torch.tensor([0.8, 0.1, 0.0])
    together = cps_step(x, v, sigma, sigma_next, 0.9, noise)
    for i in range(3):
        pick = slice(i, i + 1)
        alone = cps_step(x[pick], v[pick], sigma[pick], sigma_next[pick], 0.9, noise[pick])
        assert torch.equal(together[pick], alone)


def test_half_precision_latents_are_computed_in_float32() -> None:
    x, v, noise = (draw.to(torch.bfloat16) for draw in draws(3))
    result = cps_step(x, v, 0.9, 0.75, 0.9, noise)
    assert result.dtype == torch.float32
    assert torch.equal(result, cps_step(x.float(), v.float(), 0.9, 0.75, 0.9, noise.float()))


def test_guidance() -> None:
    cond, uncond = draws(2, dtype=torch.float32)
    assert_close(cfg(cond, uncond, 1.0), cond, torch.float32)
    assert torch.equal(cfg(cond, uncond, 0.0), uncond)
    torch.testing.assert_close(cfg(cond, uncond, 7.0), 7 * cond - 6 * uncond, rtol=1e-5, atol=1e-5)
    scales = torch.linspace(0, 3, len(cond))
    each = torch.cat([cfg(cond[i : i + 1], uncond[i : i + 1], float(g)) for i, g in enumerate(scales)])
    torch.testing.assert_close(cfg(cond, uncond, scales), each, rtol=1e-6, atol=1e-6)


def test_guidance_falls_in_a_straight_line() -> None:
    t = torch.tensor([0.0, 0.5, 0.725, 0.95, 1.0])
    torch.testing.assert_close(guidance_at(t, 4.0, 1.5), torch.tensor([4.0, 4.0, 2.75, 1.5, 1.5]))


@DTYPES
@pytest.mark.parametrize("eta", [0.2, 0.9])
def test_gaussian_logprob_is_the_density_of_torch(dtype: torch.dtype, eta: float) -> None:
    x, v, x_next = draws(3, dtype=dtype)
    mean, std = cps_mean_std(x, v, torch.tensor([0.9, 0.75, 0.5]), torch.tensor([0.7, 0.5, 0.1]), eta)
    expected = torch.distributions.Normal(mean, std).log_prob(x_next).sum(dim=(1, 2, 3))
    actual = cps_logprob(x_next, mean, std, "gaussian")
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected)


@DTYPES
def test_reduced_logprob_is_the_negative_mean_square_and_the_default(dtype: torch.dtype) -> None:
    x_next, mean = draws(2, dtype=dtype)
    std = torch.full((3, 1, 1, 1), 0.3, dtype=dtype)
    expected = torch.stack([-((a - b) ** 2).mean() for a, b in zip(x_next, mean, strict=True)])
    assert_close(cps_logprob(x_next, mean, std), expected, dtype)
    assert torch.equal(cps_logprob(x_next, mean, std), cps_logprob(x_next, mean, std, "reduced"))


def test_gradients_of_the_two_forms_differ_by_the_stated_factor() -> None:
    x_next, mean = draws(2)
    mean.requires_grad_()
    std = torch.tensor([0.8, 0.4, 0.05], dtype=torch.float64).view(3, 1, 1, 1)
    (reduced,) = torch.autograd.grad(cps_logprob(x_next, mean, std, "reduced").sum(), mean)
    (gaussian,) = torch.autograd.grad(cps_logprob(x_next, mean, std, "gaussian").sum(), mean)
    factor = 2 * std.square() / math.prod(SHAPE[1:])
    torch.testing.assert_close(reduced, factor * gaussian, rtol=1e-12, atol=0)


def test_gradient_reaches_the_velocity() -> None:
    x, v, noise = draws(3)
    v.requires_grad_()
    (gradient,) = torch.autograd.grad(cps_step(x, v, 0.9, 0.5, 0.9, noise).sum(), v)
    expected = -0.5 * 0.9 + 0.5 * math.cos(0.45 * math.pi) * 0.1
    torch.testing.assert_close(gradient, torch.full_like(v, expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("sigma", "sigma_next", "eta", "cause"),
    [
        (0.5, 0.6, 0.9, "sigma_next must be at most sigma"),
        (torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.4, 0.6, 0.1]), 0.9, "sigma_next must be at most"),
        (1.2, 0.5, 0.9, r"sigma must lie in \[0, 1\]"),
        (0.5, -0.1, 0.9, r"sigma_next must lie in \[0, 1\]"),
        (float("nan"), 0.5, 0.9, r"sigma must lie in \[0, 1\]"),
        (torch.full((2,), 0.5), 0.4, 0.9, "sigma must be a scalar or have shape"),
        (0.9, 0.5, 1.1, r"eta must lie in \[0, 1\]"),
        (0.9, 0.5, -0.1, r"eta must lie in \[0, 1\]"),
    ],
)
def test_wrong_levels_are_refused(sigma: float, sigma_next: float, eta: float, cause: str) -> None:
    x, v, noise = draws(3)
    with pytest.raises(ValueError, match=cause):
        cps_step(x, v, sigma, sigma_next, eta, noise)


def test_equal_levels_of_different_precision_are_in_order() -> None:
    x, v, noise = draws(3, dtype=torch.float32)
    found = cps_step(x, v, torch.tensor(0.9, dtype=torch.float32), 0.9, 0.9, noise)
    torch.testing.assert_close(found, cps_step(x, v, 0.9, 0.9, 0.9, noise))


def test_wrong_shapes_and_forms_are_refused() -> None:
    x, v = draws(2)
    with pytest.raises(ValueError, match="one shape"):
        to_x0(x, 0.5, v[:1])
    with pytest.raises(ValueError, match="one shape"):
        to_x0(x[0], 0.5, v[0])
    with pytest.raises(ValueError, match="form must be"):
        cps_logprob(x, v, torch.ones(3, 1, 1, 1), "exact")  # type: ignore[arg-type]

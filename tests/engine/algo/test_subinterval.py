import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rtdmd_cli.engine.algo.subinterval import (
    clean_parts,
    consistency_time,
    renoise,
    renoise_time,
    velocity_target,
)

SHAPE = (3, 2, 4, 5)
SCHEDULE = [0.9, 0.75, 0.5, 0.0]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
fast = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def rising_levels(draw: st.DrawFn, count: int) -> list[float]:
    """Levels s < t < ... in [0, 1], at least 0.004 apart."""
    gaps = [draw(st.floats(0.0, 1.0)) for _ in range(count + 1)]
    room = 1 - 0.004 * (count - 1)
    levels = [sum(gaps[: i + 1]) / max(sum(gaps), 1e-3) * room + 0.004 * i for i in range(count)]
    return [min(level, 1.0) for level in levels]


def draws(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=dtype) for _ in range(count)]


def kernel(s: float, t: float) -> tuple[Tensor, Tensor]:
    """Coefficients (a, sd) of renoise, read off its linearity."""
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    return renoise(one, s, t, zero), renoise(zero, s, t, one)


def velocity_coefficients(s: float, t: float) -> tuple[Tensor, Tensor]:
    """Coefficients of x_s and of the noise in u."""
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    (of_x, scale), (of_noise, _) = velocity_target(one, s, t, zero), velocity_target(zero, s, t, one)
    return of_x / scale, of_noise / scale


@given(levels=rising_levels(2))
@fast
def test_kernel_is_the_published_one(levels: list[float]) -> None:
    s, t = levels
    a, sd = kernel(s, t)
    assert a.item() == pytest.approx((1 - t) / (1 - s), rel=1e-12)
    assert sd.item() ** 2 == pytest.approx(t**2 - ((1 - t) / (1 - s)) ** 2 * s**2, rel=1e-11)


@given(levels=rising_levels(2))
@fast
def test_velocity_target_is_the_time_derivative_of_renoise(levels: list[float]) -> None:
    s, t = levels
    x_s, noise = draws(2)
    moment = torch.full((3,), t, dtype=torch.float64)
    _, derivative = torch.autograd.functional.jvp(
        lambda value: renoise(x_s, s, value, noise), moment, torch.ones_like(moment)
    )
    u_scaled, scale = velocity_target(x_s, s, t, noise)
    torch.testing.assert_close(u_scaled, scale * derivative, rtol=1e-10, atol=1e-10)


@DTYPES
@pytest.mark.parametrize("s", SCHEDULE)
def test_velocity_target_is_the_difference_quotient(dtype: torch.dtype, s: float) -> None:
    """The derivative by central differences in float64, against the target in either precision."""
    x_s, noise = draws(2)
    t, h = torch.tensor([s + 0.02, (1 + s) / 2, 0.98], dtype=torch.float64), 1e-5
    quotient = (renoise(x_s, s, t + h, noise) - renoise(x_s, s, t - h, noise)) / (2 * h)
    u_scaled, scale = velocity_target(x_s.to(dtype), s, t.to(dtype), noise.to(dtype))
    assert u_scaled.dtype == scale.dtype == dtype
    assert scale.shape == (3, 1, 1, 1)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-6
    torch.testing.assert_close((u_scaled / scale).double(), quotient, rtol=tolerance, atol=tolerance)


@DTYPES
@given(t=st.floats(0.02, 1.0))
@fast
def test_from_a_clean_latent_the_target_is_noise_minus_x0(dtype: torch.dtype, t: float) -> None:
    x0, noise = draws(2, dtype=dtype)
    u_scaled, scale = velocity_target(x0, 0.0, t, noise)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(u_scaled / scale, noise - x0, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(scale, torch.full_like(scale, t), rtol=tolerance, atol=0)
    expected = (1 - t) * x0 + t * noise
    torch.testing.assert_close(renoise(x0, 0.0, t, noise), expected, rtol=tolerance, atol=tolerance)


@given(levels=rising_levels(3))
@fast
def test_renoise_composes_in_distribution(levels: list[float]) -> None:
    """s to t to u equals s to u: both are linear with normal noise, so mean and variance decide."""
    s, t, u = levels
    (a_st, sd_st), (a_tu, sd_tu), (a_su, sd_su) = kernel(s, t), kernel(t, u), kernel(s, u)
    torch.testing.assert_close(a_tu * a_st, a_su, rtol=1e-12, atol=1e-15)
    variance = a_tu.square() * sd_st.square() + sd_tu.square()
    torch.testing.assert_close(variance, sd_su.square(), rtol=1e-11, atol=1e-15)


@given(levels=rising_levels(2))
@fast
def test_renoise_carries_the_flow_at_s_to_the_flow_at_t(levels: list[float]) -> None:
    """From x_s = (1-s) x0 + s eps: (1-t) of the picture, and noise of variance t^2."""
    s, t = levels
    a, sd = kernel(s, t)
    assert a.item() * (1 - s) == pytest.approx(1 - t, abs=1e-14)
    assert (a * s).item() ** 2 + sd.item() ** 2 == pytest.approx(t**2, abs=1e-14)


def test_renoise_composes_in_samples() -> None:
    generator = torch.Generator().manual_seed(5)
    shape = (1, 1, 400, 500)
    x_s = torch.full(shape, 1.3)
    n1, n2, n3 = (torch.randn(shape, generator=generator) for _ in range(3))
    two, one = renoise(renoise(x_s, 0.5, 0.6, n1), 0.6, 0.8, n2), renoise(x_s, 0.5, 0.8, n3)
    count, std = x_s.numel(), one.std().item()
    assert abs(two.mean().item() - one.mean().item()) < 4 * std * math.sqrt(2 / count)
    assert abs(two.std().item() - std) < 4 * std / math.sqrt(count)
    assert one.mean().item() == pytest.approx(0.4 * 1.3, abs=4 * std / math.sqrt(count))


@given(levels=rising_levels(2), mean=st.floats(-2, 2), spread=st.floats(0.1, 3))
@fast
def test_expected_target_is_the_marginal_velocity_of_a_gaussian(
    levels: list[float], mean: float, spread: float
) -> None:
    """x0 ~ N(mean, spread^2): u and x_t are jointly normal, so E[u | x_t] is linear, in closed form."""
    s, t = levels
    (a, sd), (p, q) = kernel(s, t), velocity_coefficients(s, t)
    variance_s = (1 - s) ** 2 * spread**2 + s**2
    variance_t = (1 - t) ** 2 * spread**2 + t**2
    slope = (p * a * variance_s + q * sd).item() / variance_t
    assert slope == pytest.approx((t - (1 - t) * spread**2) / variance_t, rel=1e-9, abs=1e-9)
    assert (p * (1 - s) * mean).item() == pytest.approx(-mean, rel=1e-12)


@pytest.mark.parametrize("s", SCHEDULE)
def test_expected_target_is_the_marginal_velocity_of_two_points(s: float) -> None:
    """x0 = ±1: u minus the exact marginal velocity is uncorrelated with any function of x_t."""
    generator = torch.Generator().manual_seed(11)
    shape, t = (1, 1, 500, 600), (1 + s) / 2
    x0 = torch.randint(0, 2, shape, generator=generator).double() * 2 - 1
    eps, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x_s = (1 - s) * x0 + s * eps
    x_t = renoise(x_s, s, t, noise)
    u_scaled, scale = velocity_target(x_s, s, t, noise)
    marginal = (x_t - torch.tanh((1 - t) * x_t / t**2)) / t
    for probe in (torch.ones_like(x_t), x_t, x_t.square(), torch.tanh(4 * x_t), torch.cos(3 * x_t)):
        product = (u_scaled / scale - marginal) * probe
        assert abs(product.mean() / product.std()).item() < 4 / math.sqrt(product.numel())


@pytest.mark.parametrize("gap", [0.01, 1e-3, 1e-4])
@pytest.mark.parametrize("s", SCHEDULE[:3])
def test_interval_arithmetic_is_accurate_near_s_with_bf16_latents(s: float, gap: float) -> None:
    x_s, noise = (draw.to(torch.bfloat16) for draw in draws(2))
    low, high = torch.tensor(s), torch.tensor(s + gap)
    u_scaled, scale = velocity_target(x_s, low, high, noise)
    x_t = renoise(x_s, low, high, noise)
    assert x_t.dtype == u_scaled.dtype == scale.dtype == torch.float32
    p, q = low.double(), high.double()
    a = (1 - q) / (1 - p)
    sd = (q**2 - a**2 * p**2).sqrt()
    exact_u = -x_s.double() / (1 - p) + (q + (1 - q) * p**2 / (1 - p) ** 2) / sd * noise.double()
    torch.testing.assert_close(scale.double(), sd.expand(3, 1, 1, 1), rtol=5e-7, atol=0)
    torch.testing.assert_close(x_t.double(), a * x_s.double() + sd * noise.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(u_scaled.double(), sd * exact_u, rtol=1e-5, atol=1e-5)


def test_every_sample_has_its_own_levels() -> None:
    x_s, noise = draws(2)
    s, t = torch.tensor([0.9, 0.5, 0.0]), torch.tensor([0.95, 0.51, 0.4])
    x_t, (u_scaled, scale) = renoise(x_s, s, t, noise), velocity_target(x_s, s, t, noise)
    for i in range(3):
        pick = slice(i, i + 1)
        alone = velocity_target(x_s[pick], s[pick], t[pick], noise[pick])
        assert torch.equal(x_t[pick], renoise(x_s[pick], s[pick], t[pick], noise[pick]))
        assert torch.equal(u_scaled[pick], alone[0])
        assert torch.equal(scale[pick], alone[1])


@given(s=st.floats(0.0, 0.97), u=st.floats(0.0, 1.0))
@fast
def test_renoise_time_lies_above_s_and_inside_the_clamp(s: float, u: float) -> None:
    t = renoise_time(torch.tensor([u]), s)
    assert t.dtype == torch.float32
    assert max(s, 0.02 - 1e-7) < t.item() <= 0.98 + 1e-7
    assert t.item() == pytest.approx(min(max(s + 0.01 + (0.99 - s) * u, 0.02), 0.98), abs=1e-6)


def test_renoise_time_per_sample_and_in_float64() -> None:
    u, s = torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64), torch.tensor([0.9, 0.75, 0.0])
    t = renoise_time(u, s, margin=0.02, t_min=0.1, t_max=0.99)
    expected = torch.tensor([0.96, 0.77, 0.99], dtype=torch.float64)
    torch.testing.assert_close(t, expected, rtol=0, atol=1e-7)


@DTYPES
def test_consistency_time(dtype: torch.dtype) -> None:
    t = torch.tensor([0.98, 0.5, 0.02], dtype=dtype)
    earlier = consistency_time(t, torch.tensor([1, 200, 200]))
    torch.testing.assert_close(earlier, torch.tensor([0.979, 0.3, 0.0], dtype=dtype), rtol=0, atol=1e-7)
    assert earlier.dtype == dtype
    assert (earlier < t).all()


def test_clean_parts_leave_out_the_noise_and_are_the_published_pair_at_zero() -> None:
    x0, x0_real = draws(2)
    s = torch.tensor([0.9, 0.5, 0.0])
    mine, real = clean_parts(x0, x0_real, s)
    keep = (1 - s.double()).view(3, 1, 1, 1)
    torch.testing.assert_close(mine, keep * x0, rtol=1e-12, atol=0)
    torch.testing.assert_close(real, keep * x0_real, rtol=1e-12, atol=0)
    assert torch.equal(mine[2], x0[2]) and torch.equal(real[2], x0_real[2])


@pytest.mark.parametrize(
    ("s", "t", "cause"),
    [
        (0.5, 0.5, "s must be below t"),
        (0.6, 0.5, "s must be below t"),
        (torch.tensor([0.1, 0.9, 0.1]), torch.tensor([0.2, 0.8, 0.3]), "s must be below t"),
        (-0.1, 0.5, r"s must lie in \[0, 1\]"),
        (0.5, 1.01, r"t must lie in \[0, 1\]"),
        (0.5, torch.full((4,), 0.9), "t must be a scalar or have shape"),
    ],
)
def test_wrong_levels_are_refused(s: float, t: float, cause: str) -> None:
    x_s, noise = draws(2)
    with pytest.raises(ValueError, match=cause):
        renoise(x_s, s, t, noise)
    with pytest.raises(ValueError, match=cause):
        velocity_target(x_s, s, t, noise)


def test_renoise_time_refuses_a_boundary_above_its_clamp_and_wrong_shapes() -> None:
    with pytest.raises(ValueError, match="s must be below t_max"):
        renoise_time(torch.tensor([0.5]), 0.98)
    with pytest.raises(ValueError, match="u must have shape"):
        renoise_time(torch.tensor([0.5]), torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match="u must have shape"):
        renoise_time(torch.tensor(0.5), 0.1)

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rtdmd_cli.engine.algo.flow import cps_logprob, cps_mean_std, cps_step
from rtdmd_cli.engine.algo.losses import (
    clipped_policy_loss,
    consistency_loss,
    dmd_loss,
    fake_score_loss,
    gaussian_kl,
    reward_hinge_loss,
)
from rtdmd_cli.engine.algo.subinterval import clean_parts, velocity_target

SHAPE = (3, 2, 4, 5)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
fast = settings(max_examples=40, deadline=None, derandomize=True)


def draws(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=dtype) for _ in range(count)]


def published_gradient(x: Tensor, x_fake: Tensor, x_real: Tensor) -> Tensor:
    """g, sample by sample, in float64."""
    rows = []
    for mine, fake, real in zip(x.double(), x_fake.double(), x_real.double(), strict=True):
        rows.append((fake - real) / max((mine - real).abs().mean().item(), 1e-6))
    return torch.stack(rows)


@DTYPES
def test_gradient_of_the_dmd_loss_is_g_over_numel(dtype: torch.dtype) -> None:
    x, x_fake, x_real = (draw.requires_grad_() for draw in draws(3, dtype=dtype))
    output = dmd_loss(x, x_fake, x_real)
    g = published_gradient(x.detach(), x_fake.detach(), x_real.detach())
    output.loss.backward()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert x.grad is not None and x.grad.dtype == dtype
    torch.testing.assert_close(x.grad.double(), g / x.numel(), rtol=tolerance, atol=0)
    assert output.loss.item() == pytest.approx(0.5 * g.square().mean().item(), rel=tolerance)
    assert x_fake.grad is None and x_real.grad is None


def test_dmd_loss_is_the_published_expression() -> None:
    x, x_fake, x_real = draws(3)
    target = x - published_gradient(x, x_fake, x_real)
    expected = 0.5 * torch.nn.functional.mse_loss(x, target)
    torch.testing.assert_close(dmd_loss(x, x_fake, x_real).loss, expected, rtol=1e-12, atol=0)


def test_dmd_gradient_keeps_a_small_gap_between_large_values() -> None:
    """In float32, x - (x - g) would round a g this small to nothing."""
    x, x_real = torch.full((1, 1, 2, 2), 100.0, requires_grad=True), torch.zeros(1, 1, 2, 2)
    dmd_loss(x, torch.full((1, 1, 2, 2), 1e-5), x_real).loss.backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full_like(x, 1e-5 / 100 / 4), rtol=1e-6, atol=0)


def test_dmd_normaliser_has_a_floor_and_nothing_hides_what_is_not_finite() -> None:
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    output = dmd_loss(x, torch.full((1, 1, 2, 2), 1e-8), torch.zeros(1, 1, 2, 2))
    output.loss.backward()
    assert output.metrics["normaliser"].item() == pytest.approx(1e-6)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full_like(x, 1e-2 / 4))
    broken = dmd_loss(x, torch.full((1, 1, 2, 2), math.nan), torch.zeros(1, 1, 2, 2))
    assert not torch.isfinite(broken.loss)


def test_dmd_loss_takes_half_precision_and_returns_the_gradient_in_it() -> None:
    x, x_fake, x_real = (draw.to(torch.bfloat16) for draw in draws(3))
    x.requires_grad_()
    output = dmd_loss(x, x_fake, x_real)
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    g = published_gradient(x.detach(), x_fake, x_real)
    torch.testing.assert_close(x.grad.double(), g / x.numel(), rtol=0.01, atol=0)


def test_dmd_reference_replaces_the_normaliser_alone() -> None:
    x, x_fake, x_real, mine, real = draws(5)
    x.requires_grad_()
    mine.requires_grad_()
    dmd_loss(x, x_fake, x_real, reference=(mine, real)).loss.backward()
    width = (mine - real).detach().abs().mean(dim=(1, 2, 3), keepdim=True)
    assert x.grad is not None and mine.grad is None
    torch.testing.assert_close(x.grad, (x_fake - x_real) / width / x.numel(), rtol=1e-12, atol=0)
    same = dmd_loss(x, x_fake, x_real, reference=(x, x_real))
    assert torch.equal(same.loss, dmd_loss(x, x_fake, x_real).loss)


@pytest.mark.parametrize(("s", "floor"), [(0.9, 1.0), (0.75, 0.84), (0.5, 0.56), (0.0, 0.0)])
def test_published_normaliser_has_the_stated_floor_and_the_noise_free_one_has_none(
    s: float, floor: float
) -> None:
    """A perfect generator: both predictions agree, only the noise of the two transitions differs."""
    generator = torch.Generator().manual_seed(2)
    x0, eps, n1, n2 = (torch.randn(1, 1, 200, 250, generator=generator) for _ in range(4))
    x, v = 0.05 * x0 + 0.95 * eps, eps - x0
    x_s, y = (cps_step(x, v, 0.95, s, 0.9, noise) for noise in (n1, n2))
    assert dmd_loss(x_s, y, y).metrics["normaliser"].item() == pytest.approx(floor, abs=0.02)
    free = dmd_loss(x_s, y, y, reference=clean_parts(x0, x0, s))
    assert free.metrics["normaliser"].item() == pytest.approx(1e-6)


@given(t=st.floats(0.02, 0.98), s=st.sampled_from([0.0, 0.3, 0.5]))
@fast
def test_fake_score_loss_is_velocity_matching_where_the_weight_is_not_capped(t: float, s: float) -> None:
    assume(t - s >= 0.01)
    x_s, noise, v = draws(3)
    u_scaled, scale = velocity_target(x_s, s, t, noise)
    output = fake_score_loss(v, u_scaled, scale)
    sd = scale[0].item()
    plain = (v - u_scaled / scale).square().mean().item()
    damping = min(1.0, 10 * sd**2)
    assert output.loss.item() == pytest.approx(damping * plain, rel=1e-9)
    assert output.metrics["weight"].item() == pytest.approx(min(1 / sd**2, 10), rel=1e-9)
    assert output.metrics["damped"].item() == float(sd**2 < 0.1)


@DTYPES
def test_fake_score_loss_weights_every_sample_by_itself(dtype: torch.dtype) -> None:
    v, u_scaled = draws(2, dtype=dtype)
    scale = torch.tensor([0.9, 0.2, 0.0], dtype=dtype).view(3, 1, 1, 1)
    terms = [
        w * (sd * v[i] - u_scaled[i]) ** 2 for i, (w, sd) in enumerate([(1 / 0.81, 0.9), (10, 0.2), (10, 0)])
    ]
    output = fake_score_loss(v, u_scaled, scale)
    assert output.loss.dtype == dtype
    torch.testing.assert_close(output.loss, torch.stack(terms).mean())
    capped = fake_score_loss(v, u_scaled, scale, max_weight=0.5)
    assert capped.metrics["weight"].item() == pytest.approx(0.5)


def test_fake_score_gradient_reaches_the_prediction_alone() -> None:
    v, u_scaled, scale = draws(3)
    scale = scale[:, :1, :1, :1].abs().clone().requires_grad_()
    v.requires_grad_()
    u_scaled.requires_grad_()
    fake_score_loss(v, u_scaled, scale).loss.backward()
    weight = (1 / scale.detach() ** 2).clamp(max=10)
    expected = 2 * weight * scale.detach() * (scale * v - u_scaled).detach() / v.numel()
    assert v.grad is not None
    torch.testing.assert_close(v.grad, expected, rtol=1e-12, atol=0)
    assert u_scaled.grad is None and scale.grad is None


def test_consistency_loss_estimates_the_squared_gap_of_the_conditional_mean() -> None:
    """Linear prediction v = c x: E[h(x', t') | x] is known and its squared gap far below the noise."""
    generator = torch.Generator().manual_seed(7)
    t, earlier, c = 0.8, 0.7, 0.6
    x = torch.full((1, 1, 500, 600), 0.9, dtype=torch.float64)
    noises = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    h_1, h_2 = ((1 - earlier * c) * cps_step(x, c * x, t, earlier, 0.9, noise) for noise in noises)
    h = (1 - t * c) * x
    mean, std = cps_mean_std(x, c * x, t, earlier, 0.9)
    gap = ((1 - earlier * c) * mean - h)[0, 0, 0, 0].item()
    noise_in_h = ((1 - earlier * c) * std).item()
    product = (h_1 - h) * (h_2 - h)
    error = product.std().item() / math.sqrt(product.numel())
    output = consistency_loss(h, h_1, h_2)
    assert abs(output.loss.item() - gap**2) < 4 * error
    assert 4 * error < 0.05 * noise_in_h**2  # a single draw, squared, would be off by that noise
    assert output.metrics["spread"].item() == pytest.approx(noise_in_h**2, rel=0.02)
    assert (product < 0).any()


@DTYPES
def test_consistency_gradient_reaches_all_three(dtype: torch.dtype) -> None:
    h, h_1, h_2 = (draw.requires_grad_() for draw in draws(3, dtype=dtype))
    output = consistency_loss(h, h_1, h_2)
    gradients = torch.autograd.grad(output.loss, (h, h_1, h_2))
    expected = (2 * h - h_1 - h_2, h_2 - h, h_1 - h)
    for gradient, value in zip(gradients, expected, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, value.detach() / h.numel())


@DTYPES
def test_first_update_of_an_epoch_has_ratio_one(dtype: torch.dtype) -> None:
    x_next, mean = draws(2, dtype=dtype)
    mean.requires_grad_()
    logp = cps_logprob(x_next, mean, torch.full((3, 1, 1, 1), 0.4, dtype=dtype))
    advantages = torch.tensor([1.5, -0.5, 2.0], dtype=dtype)
    output = clipped_policy_loss(logp, logp.detach(), advantages, 1e-5)
    assert output.metrics["ratio"].item() == 1
    assert output.metrics["clipped"].item() == 0
    torch.testing.assert_close(output.loss, -advantages.mean())
    (gradient,) = torch.autograd.grad(output.loss, logp)
    torch.testing.assert_close(gradient, -advantages / 3)


def test_policy_loss_follows_the_clipped_surrogate() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.05], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0], dtype=torch.float64)
    logp_old = torch.linspace(-3, 2, 5, dtype=torch.float64, requires_grad=True)
    logp = (logp_old.detach() + ratio.log()).requires_grad_()
    output = clipped_policy_loss(logp, logp_old, advantages, 0.1)
    expected = torch.tensor([-1.1, 1.5, -0.5, 0.9, -2.1], dtype=torch.float64)
    torch.testing.assert_close(output.loss, expected.mean())
    output.loss.backward()
    slopes = torch.tensor([0.0, 1.5, -0.5, 0.0, -2.1], dtype=torch.float64) / 5
    assert logp.grad is not None and logp_old.grad is None
    torch.testing.assert_close(logp.grad, slopes)
    assert output.metrics["clipped"].item() == pytest.approx(0.8)


@DTYPES
def test_hinge_is_a_margin_on_the_reward(dtype: torch.dtype) -> None:
    reward = torch.tensor([2.5, 3.5, -1.0, 3.0], dtype=dtype, requires_grad=True)
    output = reward_hinge_loss(reward, 3.0)
    assert output.loss.dtype == dtype
    assert output.loss.item() == pytest.approx((0.5 + 0 + 4.0 + 0) / 4)
    assert output.metrics["active"].item() == 0.5
    output.loss.backward()
    torch.testing.assert_close(reward.grad, torch.tensor([-0.25, 0, -0.25, 0], dtype=dtype))


def test_kl_is_that_of_two_normals_per_element() -> None:
    mean, mean_ref = draws(2)
    std = torch.tensor([0.8, 0.4, 0.1], dtype=torch.float64).view(3, 1, 1, 1)
    ours, theirs = torch.distributions.Normal(mean, std), torch.distributions.Normal(mean_ref, std)
    expected = torch.distributions.kl_divergence(ours, theirs).mean(dim=(1, 2, 3))
    torch.testing.assert_close(gaussian_kl(mean, mean_ref, std), expected, rtol=1e-12, atol=0)


def test_equal_micro_batches_average_to_the_whole_batch() -> None:
    a, b, c = draws(3)
    scale = a[:, :1, :1, :1].abs()
    parts = [slice(i, i + 1) for i in range(3)]
    for whole, pieces in (
        (dmd_loss(a, b, c), [dmd_loss(a[i], b[i], c[i]) for i in parts]),
        (fake_score_loss(a, b, scale), [fake_score_loss(a[i], b[i], scale[i]) for i in parts]),
        (consistency_loss(a, b, c), [consistency_loss(a[i], b[i], c[i]) for i in parts]),
    ):
        torch.testing.assert_close(whole.loss, torch.stack([piece.loss for piece in pieces]).mean())


def test_metrics_hold_no_graph() -> None:
    a, b, c = (draw.requires_grad_() for draw in draws(3))
    scale, logp = a[:, :1, :1, :1], a.mean(dim=(1, 2, 3))
    outputs = [
        dmd_loss(a, b, c),
        fake_score_loss(a, b, scale),
        consistency_loss(a, b, c),
        clipped_policy_loss(logp, logp, logp, 0.1),
        reward_hinge_loss(logp, 3.0),
    ]
    for output in outputs:
        assert output.loss.ndim == 0 and output.loss.requires_grad
        assert output.metrics
        for value in output.metrics.values():
            assert value.ndim == 0 and not value.requires_grad


def test_wrong_shapes_and_clips_are_refused() -> None:
    x, y = draws(2)
    with pytest.raises(ValueError, match="one shape"):
        dmd_loss(x, x[:1], y)
    with pytest.raises(ValueError, match="one shape"):
        dmd_loss(x, x, y, reference=(x[:1], y[:1]))
    with pytest.raises(ValueError, match="one length"):
        clipped_policy_loss(torch.zeros(3), torch.zeros(1), torch.zeros(3), 0.1)
    with pytest.raises(ValueError, match="one length"):
        reward_hinge_loss(torch.zeros(3, 1), 3.0)
    with pytest.raises(ValueError, match="clip must be positive"):
        clipped_policy_loss(torch.zeros(3), torch.zeros(3), torch.zeros(3), 0.0)

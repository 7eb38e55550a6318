"""The losses of both stages (method, sections 3 and 4).

Each returns the scalar loss and, detached, the figures worth logging. Means run over all elements of the
batch, so that equal micro-batches average to the whole.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rtdmd_cli.engine.algo.flow import compute_dtype, widen

NORMALISER_FLOOR = 1e-6


class LossOutput(NamedTuple):
    """loss: 0-d tensor with gradient; metrics: 0-d tensors without."""

    loss: Tensor
    metrics: dict[str, Tensor]


def _same_length(**vectors: Tensor) -> None:
    shapes = {name: list(vector.shape) for name, vector in vectors.items()}
    if any(len(shape) != 1 for shape in shapes.values()) or len({shape[0] for shape in shapes.values()}) != 1:
        raise ValueError(f"expected vectors of one length [B], got {shapes}")


def dmd_loss(
    x: Tensor, x_fake: Tensor, x_real: Tensor, *, reference: tuple[Tensor, Tensor] | None = None
) -> LossOutput:
    """Distribution matching (section 3): ``L = 1/2 mean (x - stopgrad(x - g))^2``, so that dL/dx = g/numel.

        g = (x_fake - x_real) / max(mean_CHW |x - x_real|, 1e-6)        per sample, no gradient

    x [B,C,H,W] the generator's sample at s; x_fake, x_real [B,C,H,W] the fake score's and the teacher's,
    carried back to s with the same noise. No gradient reaches them. reference: a pair of [B,C,H,W] whose
    mean distance replaces |x - x_real| in the normaliser (the noise-free variant: subinterval.clean_parts);
    None is the published one.

    The loss is computed as ``1/2 mean (g + (x - stopgrad(x)))^2``: the same value and gradient, without
    rounding g to the resolution of x.
    metrics: normaliser (mean over samples, floored), gap = mean |x_fake - x_real|, gradient = mean |g|.
    """
    x, x_fake, x_real = widen(x, x_fake, x_real)
    with torch.no_grad():
        _, near, far = (x, x, x_real) if reference is None else widen(x, *reference)
        distance = (near - far).abs().mean(dim=(1, 2, 3), keepdim=True)
        normaliser = distance.clamp(min=NORMALISER_FLOOR).to(x.dtype)
        gap = x_fake - x_real
        g = gap / normaliser
    loss = 0.5 * (g + (x - x.detach())).square().mean()
    metrics = {"normaliser": normaliser.mean(), "gap": gap.abs().mean(), "gradient": g.abs().mean()}
    return LossOutput(loss, metrics)


def fake_score_loss(v_pred: Tensor, u_scaled: Tensor, scale: Tensor, max_weight: float = 10.0) -> LossOutput:
    """Velocity matching of the fake score (section 3).

        L = mean[ weight (sd v - sd u)^2 ]        weight = clamp(1/sd^2, 0, max_weight)

    v_pred [B,C,H,W]; u_scaled = sd u [B,C,H,W] and scale = sd [B,1,1,1] from velocity_target; max_weight > 0.
    Where sd^2 >= 1/max_weight this is mean (v - u)^2. Gradient flows to v_pred alone.
    metrics: weight (mean), damped (share of samples whose weight was capped).
    """
    v_pred, u_scaled = widen(v_pred, u_scaled, levels=(scale,))
    sd = scale.detach().to(v_pred.dtype)
    weight = sd.square().reciprocal().clamp(0, max_weight)
    loss = (weight * (sd * v_pred - u_scaled.detach()).square()).mean()
    damped = (sd.square() * max_weight < 1).to(sd.dtype).mean()
    return LossOutput(loss, {"weight": weight.mean(), "damped": damped})


def consistency_loss(h_anchor: Tensor, h_1: Tensor, h_2: Tensor) -> LossOutput:
    """Consistency regulariser of the fake score (section 3): ``mean[(h_1 - h_anchor) (h_2 - h_anchor)]``.

    All [B,C,H,W]: clean predictions at x_t and at two independent transitions from it. An unbiased estimate
    of ``mean (E[h_1 | x_t] - h_anchor)^2``, so a single draw can be negative. Gradients flow into all
    three.
    metrics: spread = mean (h_1 - h_2)^2 / 2, the variance that the product of two draws leaves out.
    """
    h_anchor, h_1, h_2 = widen(h_anchor, h_1, h_2)
    loss = ((h_1 - h_anchor) * (h_2 - h_anchor)).mean()
    return LossOutput(loss, {"spread": (h_1 - h_2).detach().square().mean() / 2})


def clipped_policy_loss(logp: Tensor, logp_old: Tensor, advantages: Tensor, clip: float) -> LossOutput:
    """Clipped surrogate of one transition (section 4).

        L = mean max(-A rho, -A clamp(rho, 1 - clip, 1 + clip))        rho = exp(logp - logp_old)

    logp, logp_old, advantages [B]; clip > 0, published 1e-5. Gradient flows to logp alone; logp_old = logp
    is the first update of an epoch, with rho = 1 and the gradient -A/B.
    metrics: ratio (mean rho), clipped (share of samples with rho outside the range).
    Raises ValueError for other shapes or clip <= 0.
    """
    _same_length(logp=logp, logp_old=logp_old, advantages=advantages)
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    dtype = compute_dtype(logp, logp_old, advantages)
    rho = (logp.to(dtype) - logp_old.detach()).exp()
    advantages = advantages.detach().to(dtype)
    loss = torch.maximum(-advantages * rho, -advantages * rho.clamp(1 - clip, 1 + clip)).mean()
    ratio = rho.detach()
    clipped = ((ratio - 1).abs() > clip).to(ratio.dtype).mean()
    return LossOutput(loss, {"ratio": ratio.mean(), "clipped": clipped})


def reward_hinge_loss(reward: Tensor, margin: float) -> LossOutput:
    """Direct reward back-propagation (section 4): ``mean relu(margin - reward)``.

    reward [B], the weighted sum of the differentiable rewards; margin in its unit, published 3.
    metrics: active (share of samples below the margin).
    Raises ValueError if reward isn't a vector.
    """
    _same_length(reward=reward)
    gap = margin - reward.to(compute_dtype(reward))
    return LossOutput(gap.relu().mean(), {"active": (gap.detach() > 0).to(gap.dtype).mean()})


def gaussian_kl(mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
    """KL to the reference per element [B] (section 4): ``mean_CHW (mean - mean_ref)^2 / (2 std^2)``.

    mean, mean_ref [B,C,H,W] and std [B,1,1,1] of one transition, from cps_mean_std. Stochastic steps only:
    std > 0.
    """
    mean, mean_ref = widen(mean, mean_ref, levels=(std,))
    return ((mean - mean_ref).square() / (2 * std.to(mean.dtype).square())).mean(dim=(1, 2, 3))

"""Rectified flow and the few-step sampler CPS (method, sections 1 and 2).

A noisy latent is ``x = (1 - sigma) x0 + sigma eps`` and every network predicts the velocity ``v = eps - x0``.
Noise levels (``sigma``, ``s``, ``t``) lie in [0, 1]: a float, a 0-d tensor, or one value per sample ``[B]``.

Levels given as floats or as tensors in host memory are checked. Levels on an accelerator are not, since
reading them would stall the queue: a wrong one shows as a non-finite loss or not at all.
"""

import math
from collections.abc import Iterable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Level: TypeAlias = float | Tensor


def compute_dtype(*values: Level) -> torch.dtype:
    """float64 if any of the values is a float64 tensor, else float32."""
    wide = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in values)
    return torch.float64 if wide else torch.float32


def widen(*latents: Tensor, levels: Iterable[Level] = ()) -> list[Tensor]:
    """Cast latents of one shape [B,C,H,W] to the dtype the formulas compute in.

    Raises ValueError if the shapes differ (they would broadcast in silence) or aren't four-dimensional.
    """
    shape = latents[0].shape
    if len(shape) != 4 or any(latent.shape != shape for latent in latents):
        shapes = ", ".join(str(list(latent.shape)) for latent in latents)
        raise ValueError(f"latents must share one shape [B,C,H,W], got {shapes}")
    dtype = compute_dtype(*latents, *levels)
    return [latent.to(dtype) for latent in latents]


def move(values: Tensor, device: torch.device) -> Tensor:
    """Bring values to the device; from host memory without waiting for the work queued there.

    Not blocking is safe in that direction: pageable memory is staged before the call returns.
    """
    return values.to(device, non_blocking=values.device.type == "cpu")


def _readable(values: Tensor) -> bool:
    """Whether values lie in host memory. Subclasses of Tensor may have none, as where shapes alone are computed."""
    return values.device.type == "cpu" and type(values) is Tensor


def per_sample(name: str, level: Level, x: Tensor) -> Tensor:
    """Bring a noise level to [B,1,1,1] in the dtype and on the device of x [B,C,H,W].

    Raises ValueError for a shape other than scalar or [B], and for a value outside [0, 1] in host memory.
    """
    values = torch.as_tensor(level, dtype=x.dtype)
    if values.ndim != 0 and values.shape != x.shape[:1]:
        raise ValueError(f"{name} must be a scalar or have shape [{x.shape[0]}], got {list(values.shape)}")
    if _readable(values) and not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"{name} must lie in [0, 1], got {values.tolist()}")
    return move(values, x.device).expand(x.shape[0]).view(-1, 1, 1, 1)


def require_order(low_name: str, low: Level, high_name: str, high: Level, strict: bool) -> None:
    """Raise ValueError unless low <= high (low < high if strict), where both are in host memory.

    Compared in float32, so that 0.9 and float32(0.9) count as equal.
    """
    lower = torch.as_tensor(low, dtype=torch.float32)
    upper = torch.as_tensor(high, dtype=torch.float32)
    if not (_readable(lower) and _readable(upper)):
        return
    if not bool((lower < upper if strict else lower <= upper).all()):
        relation = "below" if strict else "at most"
        raise ValueError(
            f"{low_name} must be {relation} {high_name}, got {lower.tolist()} and {upper.tolist()}"
        )


def to_x0(x: Tensor, sigma: Level, v: Tensor) -> Tensor:
    """Clean latent ``x0 = x - sigma v`` (section 1). x, v, result [B,C,H,W]; sigma in [0, 1]."""
    x, v = widen(x, v, levels=(sigma,))
    return x - per_sample("sigma", sigma, x) * v


def to_eps(x: Tensor, sigma: Level, v: Tensor) -> Tensor:
    """Noise ``eps = x + (1 - sigma) v`` (section 1). x, v, result [B,C,H,W]; sigma in [0, 1]."""
    x, v = widen(x, v, levels=(sigma,))
    return x + (1 - per_sample("sigma", sigma, x)) * v


def cfg(v_cond: Tensor, v_uncond: Tensor, guidance: float | Tensor) -> Tensor:
    """Classifier-free guidance ``v_uncond + guidance (v_cond - v_uncond)`` (section 1); all [B,C,H,W].

    guidance, a number or [B]: 1 is the conditional prediction, 0 the unconditional one. The teacher's alone.
    """
    v_cond, v_uncond = widen(v_cond, v_uncond)
    scale = guidance.to(v_cond).view(-1, 1, 1, 1) if isinstance(guidance, Tensor) else guidance
    return v_uncond + scale * (v_cond - v_uncond)


def guidance_at(t: Tensor, low: float, high: float) -> Tensor:
    """Guidance scale [B] at noise level t [B]: `low` up to 0.5, `high` from 0.95, a straight line between.

    Not of the method's page: at high noise guidance points far outside the data, and distribution matching has
    no later step that corrects it, as a sampler has (Kynkaanniemi et al. 2024 limit guidance to an interval).
    """
    share = ((t.to(torch.float32) - 0.5) / 0.45).clamp(0, 1)
    return low + (high - low) * share


def cps_mean_std(x: Tensor, v: Tensor, sigma: Level, sigma_next: Level, eta: float) -> tuple[Tensor, Tensor]:
    """Mean [B,C,H,W] and standard deviation [B,1,1,1] of one CPS transition (section 2).

        mean = (1 - sigma') x0 + sigma' cos(eta pi/2) eps        std = sigma' sin(eta pi/2)

    x, v [B,C,H,W]; 0 <= sigma_next <= sigma <= 1; eta in [0, 1]. At sigma_next = 0: mean x0, std 0.
    Raises ValueError for eta outside [0, 1] and for levels out of order or range (in host memory).
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    x, v = widen(x, v, levels=(sigma, sigma_next))
    level = per_sample("sigma_next", sigma_next, x)
    x0, eps = to_x0(x, sigma, v), to_eps(x, sigma, v)
    require_order("sigma_next", sigma_next, "sigma", sigma, strict=False)
    mean = (1 - level) * x0 + level * math.cos(eta * math.pi / 2) * eps
    return mean, level * math.sin(eta * math.pi / 2)


def cps_step(x: Tensor, v: Tensor, sigma: Level, sigma_next: Level, eta: float, noise: Tensor) -> Tensor:
    """One CPS transition ``mean + std noise`` (section 2); see cps_mean_std for ranges and errors.

    x, v, noise, result [B,C,H,W]; noise is standard normal. eta = 0 is the Euler step, eta = 1 renoises x0.
    """
    x, v, noise = widen(x, v, noise, levels=(sigma, sigma_next))
    mean, std = cps_mean_std(x, v, sigma, sigma_next, eta)
    return mean + std * noise


def cps_logprob(
    x_next: Tensor, mean: Tensor, std: Tensor, form: Literal["reduced", "gaussian"] = "reduced"
) -> Tensor:
    """Log-probability [B] of a CPS transition (section 2). x_next, mean [B,C,H,W]; std [B,1,1,1].

    reduced:  ``-mean_CHW (x_next - mean)^2``. Constants and 1/(2 std^2) are dropped. The default, because the
              published clip range and learning rate belong to it.
    gaussian: the exact log-density summed over C,H,W; needs std > 0 (a deterministic step has no density).

    The gradient of the reduced form is the gradient of the gaussian form times 2 std^2/(C H W), a factor that
    differs per step. The gaussian form grows with C H W: at 262,144 elements float32 resolves it to about 0.03, so
    differences of two such values finer than that need float64 inputs.
    Raises ValueError for an unknown form.
    """
    x_next, mean = widen(x_next, mean, levels=(std,))
    square = (x_next - mean).square()
    if form == "reduced":
        return -square.mean(dim=(1, 2, 3))
    if form == "gaussian":
        std = std.to(mean.dtype)
        return (-square / (2 * std.square()) - std.log() - 0.5 * math.log(2 * math.pi)).sum(dim=(1, 2, 3))
    raise ValueError(f"form must be 'reduced' or 'gaussian', got {form!r}")

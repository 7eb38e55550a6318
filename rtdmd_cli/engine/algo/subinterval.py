"""Diffusion inside the interval above a boundary s, from x_s and not from a clean image (method, section 3).

With ``a = (1 - t)/(1 - s)`` and ``sd = sqrt(t^2 - a^2 s^2)``, ``x_t = a x_s + sd n`` has the law of the
flow at t if x_s has the law of the flow at s. Levels are used as in flow.py; the arithmetic is float32
whatever the latents are.
"""

import torch
from torch import Tensor

from rtdmd_cli.engine.algo.flow import Level, compute_dtype, move, per_sample, require_order, widen


def _kernel(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(a, sd). t - a s = (t - s)/(1 - s), so sd^2 = (t - a s)(t + a s) is formed without cancellation."""
    a = (1 - t) / (1 - s)
    return a, ((t - s) * (t + a * s) / (1 - s)).sqrt()


def _levels(s: Level, t: Level, x: Tensor) -> tuple[Tensor, Tensor]:
    low, high = per_sample("s", s, x), per_sample("t", t, x)
    require_order("s", s, "t", t, strict=True)
    return low, high


def renoise_time(
    u: Tensor, s: Level, margin: float = 0.01, t_min: float = 0.02, t_max: float = 0.98
) -> Tensor:
    """Time t [B] to diffuse to: uniform on [s + margin, 1], then clamped to [t_min, t_max] (section 3).

    u [B] uniform draws in [0, 1]; s scalar or [B], below t_max (or the clamp would put t at or under s).
    Raises ValueError if s >= t_max (in host memory) or if the shapes differ.
    """
    require_order("s", s, "t_max", t_max, strict=True)
    dtype = compute_dtype(u, s)
    low = move(torch.as_tensor(s, dtype=dtype), u.device) + margin
    if u.ndim != 1 or low.shape not in ((), u.shape):
        raise ValueError(
            f"u must have shape [B] and s be scalar or [B], got {list(u.shape)}, {list(low.shape)}"
        )
    return (low + (1 - low) * u.to(dtype)).clamp(t_min, t_max)


def consistency_time(t: Tensor, k: Tensor) -> Tensor:
    """Time of the consistency draws ``t' = max(t - k/1000, 0)`` (section 3). t [B]; k [B] integers 1..200."""
    dtype = compute_dtype(t)
    return (t.to(dtype) - k.to(dtype) / 1000).clamp(min=0)


def renoise(x_s: Tensor, s: Level, t: Level, noise: Tensor) -> Tensor:
    """Diffuse from s to t: ``x_t = a x_s + sd noise`` (section 3).

    x_s, noise, result [B,C,H,W]; noise is standard normal; 0 <= s < t <= 1.
    Raises ValueError for levels out of order or range (in host memory).
    """
    x_s, noise = widen(x_s, noise, levels=(s, t))
    a, sd = _kernel(*_levels(s, t, x_s))
    return a * x_s + sd * noise


def velocity_target(x_s: Tensor, s: Level, t: Level, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Velocity of renoise, times sd (section 3): ``u_scaled = sd u`` [B,C,H,W] and ``scale = sd`` [B,1,1,1].

        u = -x_s/(1-s) + (t + (1-t) s^2/(1-s)^2)/sd noise = d x_t/dt at fixed x_s and noise

    x_s, noise [B,C,H,W]; 0 <= s < t <= 1. The scaled form stays finite as t approaches s. At s = 0 the
    target u is noise - x0.
    Raises ValueError for levels out of order or range (in host memory).
    """
    x_s, noise = widen(x_s, noise, levels=(s, t))
    low, high = _levels(s, t, x_s)
    a, sd = _kernel(low, high)
    return -sd * x_s / (1 - low) + (high + a * low.square() / (1 - low)) * noise, sd


def clean_parts(x0: Tensor, x0_real: Tensor, s: Level) -> tuple[Tensor, Tensor]:
    """What dmd_loss compares for its noise-free normaliser: ``((1-s) x0, (1-s) x0_real)``, both [B,C,H,W].

    x0 is the clean prediction behind the transition that landed at s, x0_real the teacher's (with CFG) at
    x_t: the parts of x_s and y_T that hold the picture. Their ``s cos(eta pi/2) eps`` and ``s sin(eta pi/2)
    noise`` are left out, because the two eps and the two noises differ at random and never agree, however
    good the generator. At s = 0 the pair is (x_s, y_T), the published one.
    """
    x0, x0_real = widen(x0, x0_real, levels=(s,))
    keep = 1 - per_sample("s", s, x0)
    return keep * x0, keep * x0_real

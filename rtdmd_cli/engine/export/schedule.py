"""The few-step schedule as a configuration of the stock scheduler.

The stock pipeline spaces raw levels evenly, `u = linspace(1, m, T)` with a small m, and its scheduler maps them by

    v(u) = s u / (1 + (s - 1) u)                           shift s
    sigma(u) = 1 - (1 - v(u)) (1 - e) / (1 - v(m))         stretched so that the last one is shift_terminal e

All of these are Moebius maps that leave 1 in place, and so is a shift of evenly spaced raw steps down to any last one:
hence s and e exist for every schedule whose raw steps are evenly spaced, and in general for no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

TOLERANCE = 2e-6  # of a sigma; float32 resolves 1e-7
ROUNDS = 50


def stock_config(config: Mapping[str, Any], sigmas: Sequence[float]) -> dict[str, Any] | None:
    """`config` of a FlowMatchEulerDiscreteScheduler, changed so that T = len(sigmas) - 1 steps take `sigmas`.

    config: as a scheduler_config.json holds it; for keys that it lacks the scheduler's defaults hold, and are added.
    sigmas: falling from 1, with the 0 at the end. None where no shift and shift_terminal give them, or where the
    scheduler shifts by resolution. What is returned has been tried on the scheduler itself.
    """
    steps, whole = len(sigmas) - 1, _with_defaults(config)
    if whole["use_dynamic_shifting"]:
        return None
    candidates = [whole]
    if steps >= 2:
        shift = _shift(sigmas, int(whole["num_train_timesteps"]))
        candidates.append(whole | {"shift": shift, "shift_terminal": float(sigmas[-2])})
    return next((found for found in candidates if agrees(found, sigmas)), None)


def agrees(config: Mapping[str, Any], sigmas: Sequence[float]) -> bool:
    """Whether the scheduler of that configuration, asked for as many steps, takes exactly these sigmas."""
    whole = _with_defaults(config)
    if whole["shift"] <= 0 or whole["shift_terminal"] == 1:
        return False
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(whole)
    scheduler.set_timesteps(len(sigmas) - 1, device="cpu")
    return all(abs(a - b) < TOLERANCE for a, b in zip(scheduler.sigmas.tolist(), sigmas, strict=True))


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """All of a scheduler's configuration: a published file holds the keys of the diffusers that wrote it."""
    whole = dict(FlowMatchEulerDiscreteScheduler.from_config(dict(config)).config)
    whole.pop("_use_default_values", None)  # of the keys named there, `from_config` drops what is changed
    return whole


def _shift(sigmas: Sequence[float], train_steps: int) -> float:
    """The shift whose second and last levels stand in the right ratio; m itself depends on it, hence the rounds.

    With w = 1 - u the map is `1 - sigma = c w / (s - (s - 1) w)`; the ratio q of `1 - sigma` at the second and the last
    level, whose w are d and n d, n = T - 1, gives `q n (s - (s - 1) d) = s - (s - 1) n d`.
    """
    n = len(sigmas) - 2
    q = (1 - sigmas[1]) / (1 - sigmas[-2])
    if n == 1:
        return 1.0  # two steps: shift_terminal alone decides
    shift, lowest = 1.0, 1 / train_steps
    for _ in range(ROUNDS):
        m = shift * lowest / (1 + (shift - 1) * lowest)
        d = (1 - m) / n
        # s (q n - q n d - 1 + n d) = n d - q n d
        shift = (n * d - q * n * d) / (q * n - q * n * d - 1 + n * d)
    return shift

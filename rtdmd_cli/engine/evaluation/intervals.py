"""95% intervals by the percentile bootstrap over prompts (Efron & Tibshirani 1993, ch. 13).

The unit is the prompt: average the pictures of one prompt first, since they are not independent. For paired
comparisons pass the differences at equal prompt and seed. Simulated, 95% means 93% to 96% from 50 values on, 92% for
20, and much less where a share so near 0 or 1 is measured that few values (or none) differ from the others.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

QUANTILES = (0.025, 0.975)
BLOCK = 1_000_000  # draws held in memory at once


class Interval(NamedTuple):
    """A mean and the ends of its 95% interval, in the unit of the values."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: Sequence[float], n: int = 2000, seed: int = 0) -> Interval:
    """Mean of one value per prompt, its interval from `n` resamples. Raises ValueError as `bootstrap_overall`."""
    return bootstrap_overall({"values": values}, n, seed)


def bootstrap_overall(tasks: Mapping[str, Sequence[float]], n: int = 2000, seed: int = 0) -> Interval:
    """Mean of the tasks' means, prompts resampled within each task, as the task sizes are part of the benchmark.

    Raises ValueError for no task, an empty task, a value that is not finite, or n < 1.
    """
    if not tasks or n < 1:
        raise ValueError("a bootstrap needs at least one task and one resample")
    rng = np.random.default_rng(seed)
    means, resampled = [], []
    for task, values in tasks.items():
        x = np.asarray(values, dtype=np.float64)
        if x.ndim != 1 or x.size == 0 or not np.isfinite(x).all():
            raise ValueError(f"task {task}: expected finite values, one per prompt")
        means.append(x.mean())
        resampled.append(_resampled_means(x, n, rng))
    low, high = np.quantile(np.mean(resampled, axis=0), QUANTILES)
    return Interval(float(np.mean(means)), float(low), float(high))


def _resampled_means(x: NDArray[np.float64], n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Means [n] of samples drawn from x [N] with replacement, N each."""
    rows = max(1, BLOCK // x.size)
    blocks = (min(rows, n - start) for start in range(0, n, rows))
    return np.concatenate([x[rng.integers(x.size, size=(k, x.size))].mean(axis=1) for k in blocks])

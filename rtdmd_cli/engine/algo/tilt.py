"""The tilt: distribution matching that leans to a reward, without the reward's gradient.

Stage 2 looks for the generator p that is closest to the teacher q tilted by a reward r:

    KL(p || q exp(tilt r) / Z)  =  E_p[log(p exp(-tilt r)) - log q] + log Z

Distribution matching (method, section 3) moves samples of p along the difference between the fake score and the teacher.
The tilt changes only what the fake score is fitted to: not p, but p exp(-tilt r), the generator's images drawn again in
favour of the poor ones. At noise level 0 the step follows the gradient of the KL above. At higher levels, where noise is
added after the drawing, the step differs but comes to rest at the same point: there the drawn images are distributed like
the teacher's, and p is proportional to q exp(tilt r). A latent on the way is drawn with the reward of its path's image.

All this holds for a fixed r. Stage 2 uses advantages as r, see `tune_reward.fake_score.drawn_images`.
"""

import torch
from torch import Tensor


def tilt_weights(reward: Tensor, tilt: float) -> Tensor:
    """Weights [N] of the images, ``exp(-tilt r)`` over their sum: float64, on the CPU, no gradient.

    reward [N], finite, N > 0; tilt >= 0 in its inverse unit.
    Raises ValueError for another shape, a reward that is not finite, or tilt < 0.
    """
    if reward.ndim != 1 or len(reward) == 0 or not reward.isfinite().all():
        raise ValueError(f"expected finite rewards [N] of at least one image, got {list(reward.shape)}")
    if not tilt >= 0:
        raise ValueError(f"tilt must be at least 0, got {tilt}")
    return torch.softmax(-tilt * reward.detach().to("cpu", torch.float64), dim=0)


def effective_share(weights: Tensor) -> Tensor:
    """Kish's effective sample size over the size, ``(sum w)^2 / (N sum w^2)``: from 1 for equal weights to 1/N."""
    return weights.sum().square() / (len(weights) * weights.square().sum())


def systematic_draw(weights: Tensor, count: int, u: float) -> Tensor:
    """Indices [count] int64, rising, each drawn ``count w_i`` times up to rounding: systematic resampling.

    The weights' cumulative sum is read at (u + 0, 1, ..., count-1) / count of its total. weights [N] >= 0, not all 0;
    count > 0; u in [0, 1), uniform. Equal weights and count = N give every index once.
    Raises ValueError for count <= 0 or u out of range.
    """
    if count <= 0 or not 0 <= u < 1:
        raise ValueError(f"expected count > 0 and 0 <= u < 1, got {count} and {u}")
    total = weights.double().cumsum(0)
    marks = (torch.arange(count, dtype=total.dtype, device=total.device) + u) / count * total[-1]
    below = torch.nextafter(
        total[-1], total.new_zeros(())
    )  # rounding must not reach the end of the last weight
    return torch.searchsorted(total, marks.minimum(below), right=True)

"""Stacked LoRA adapters as one adapter: exact algebra, or a lower rank with its error.

An adapter changes a layer's weight W [out, in] by `scale * B A`, with A [r, in] and B [out, r]. Adapters on the same
layer add up, and the sum is again one adapter with scale 1:

    s_1 B_1 A_1 + s_2 B_2 A_2 = [s_1 B_1, s_2 B_2] [A_1; A_2]        rank r_1 + r_2

In general no smaller rank holds the sum. A lower one is the truncated singular value decomposition of B A, the best
approximation in the Frobenius norm (Eckart and Young 1936).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # A [r, in], B [out, r]


@dataclass(frozen=True)
class Part:
    """One adapter on one layer: `scale * B A`; a [r, in], b [out, r], scale = alpha / r."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Folded:
    """One adapter. layers: layer -> (A [rank, in], B [out, rank]), float32 on the CPU, scale 1.

    exact_rank: the rank that holds the sum exactly. error: |difference| / |sum| in the Frobenius norm over all layers;
    0 where nothing was cut off.
    """

    layers: dict[str, Pair]
    rank: int
    exact_rank: int
    error: float


def fold(stacks: Mapping[str, Sequence[Part]], rank: int | None = None) -> Folded:
    """The sum of the parts of each layer as one adapter whose layers all have the same rank.

    The same rank everywhere, smaller layers filled up with zeros, because loaders without an alpha take the rank of
    one layer for the rank of all. rank: at most that; None for no limit.
    """
    summed = {name: _concatenated(parts) for name, parts in stacks.items()}
    exact = max((a.shape[0] for a, _ in summed.values()), default=0) or 1
    if rank is None or rank >= exact:
        return Folded({name: _padded(pair, exact) for name, pair in summed.items()}, exact, exact, 0.0)
    cut, lost, total = {}, 0.0, 0.0
    for name, pair in summed.items():
        cut[name], dropped, kept = _truncated(pair, rank)
        lost, total = lost + dropped, total + dropped + kept
    layers = {name: _padded(pair, rank) for name, pair in cut.items()}
    return Folded(layers, rank, exact, math.sqrt(lost / total) if total else 0.0)


def _concatenated(parts: Sequence[Part]) -> Pair:
    """The exact sum; parts that are zero are left out, and no rank exceeds that of the layer itself."""
    used = [part for part in parts if bool(part.b.any())]
    if not used:
        first = parts[0]
        return first.a.new_zeros(0, first.a.shape[1]), first.b.new_zeros(first.b.shape[0], 0)
    a = torch.cat([part.a.detach().cpu().float() for part in used])
    b = torch.cat([part.scale * part.b.detach().cpu().float() for part in used], dim=1)
    most = min(a.shape[1], b.shape[0])
    return (a, b) if a.shape[0] <= most else _truncated((a, b), most)[0]


def _truncated(pair: Pair, rank: int) -> tuple[Pair, float, float]:
    """The best approximation of B A of that rank, and the squared norms of what was dropped and kept.

    Computed in float64 on the small core of two QR decompositions, never on the [out, in] product.
    """
    a, b = pair[0].double(), pair[1].double()
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    low = (root[:, None] * vh[:rank] @ q_a.T).float(), (q_b @ u[:, :rank] * root).float()
    return low, float(s[rank:].square().sum()), float(s[:rank].square().sum())


def _padded(pair: Pair, rank: int) -> Pair:
    a, b = pair
    missing = rank - a.shape[0]
    return (
        torch.cat([a, a.new_zeros(missing, a.shape[1])]).contiguous(),
        torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1).contiguous(),
    )

"""Random numbers keyed by (seed, stream, iteration, sample index), never drawn from global state.

A sample's numbers depend on its key alone: micro-batches, several processes, resume and evaluation agree.
Everything is drawn on the CPU, so a GPU run sees the same numbers.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def generator(seed: int, stream: str, *key: int) -> torch.Generator:
    """The CPU generator of (seed, stream, *key), seeded with a blake2b hash of the tuple.

    torch's CPU generator uses the low 32 bits of a seed: among a million keys some hundred pairs share their
    numbers. Such pairs lie anywhere in a run; two in one batch of 1,000 samples have a chance of 1 in 8,000.
    """
    text = repr((int(seed), stream, *(int(part) for part in key)))
    value = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
    return torch.Generator().manual_seed(value)


def normal(shape: Sequence[int], seed: int, stream: str, iteration: int, indices: Sequence[int]) -> Tensor:
    """Standard normal numbers, float32 on the CPU, [len(indices), *shape]; row i is of sample indices[i]."""
    rows = [
        torch.randn(tuple(shape), generator=generator(seed, stream, iteration, index), dtype=torch.float32)
        for index in indices
    ]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def uniform(
    low: float, high: float, seed: int, stream: str, iteration: int, indices: Sequence[int]
) -> Tensor:
    """Numbers in [low, high], float32 on the CPU, [len(indices)]; `high` itself only by rounding."""
    rows = [
        torch.rand((), generator=generator(seed, stream, iteration, index), dtype=torch.float64)
        for index in indices
    ]
    unit = torch.stack(rows) if rows else torch.empty(0, dtype=torch.float64)
    return (low + (high - low) * unit).to(torch.float32)


def integers(low: int, high: int, seed: int, stream: str, iteration: int, indices: Sequence[int]) -> Tensor:
    """Whole numbers from `low` to `high` - 1, each as likely, int64 on the CPU, [len(indices)]."""
    rows = [
        torch.randint(low, high, (), generator=generator(seed, stream, iteration, index)) for index in indices
    ]
    return torch.stack(rows) if rows else torch.empty(0, dtype=torch.int64)


def choice(options: Sequence[T], seed: int, stream: str, *key: int) -> T:
    """One of `options`, each as likely: for draws that a whole batch shares. ValueError if there is none."""
    if not options:
        raise ValueError("nothing to choose from")
    return options[int(torch.randint(0, len(options), (), generator=generator(seed, stream, *key)))]


def permutation(count: int, seed: int, stream: str, *key: int) -> Tensor:
    """The numbers 0 to `count` - 1 in random order, int64 on the CPU, [count]."""
    return torch.randperm(count, generator=generator(seed, stream, *key))

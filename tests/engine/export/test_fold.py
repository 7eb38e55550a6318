"""Stacked adapters as one: the product, the rank, and the error of a lower one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rtdmd_cli.engine.export.fold import Part, fold

IN, OUT = 9, 7


def part(rank: int, scale: float, seed: int) -> Part:
    random = torch.Generator().manual_seed(seed)
    return Part(torch.randn(rank, IN, generator=random), torch.randn(OUT, rank, generator=random), scale)


def change(parts: list[Part]) -> Tensor:
    """The change of the weight [OUT, IN], in float64."""
    total = torch.zeros(OUT, IN, dtype=torch.float64)
    for each in parts:
        total += each.scale * each.b.double() @ each.a.double()
    return total


def test_the_sum_is_exact_and_its_rank_the_sum_of_the_ranks() -> None:
    parts = [part(2, 2.0, 0), part(3, 0.5, 1)]
    found = fold({"x": parts})
    a, b = found.layers["x"]
    assert (found.rank, found.exact_rank, found.error) == (5, 5, 0.0)
    assert a.shape == (5, IN) and b.shape == (OUT, 5) and a.dtype == torch.float32
    assert torch.equal(a[:2], parts[0].a) and torch.equal(b[:, 2:], 0.5 * parts[1].b)
    assert torch.allclose((b @ a).double(), change(parts), atol=1e-5)


def test_parts_that_do_nothing_take_no_rank() -> None:
    still = Part(torch.ones(4, IN), torch.zeros(OUT, 4), 1.0)
    found = fold({"x": [part(2, 1.0, 0), still], "y": [still]})
    assert found.rank == 2
    assert not bool(found.layers["y"][1].any()) and found.layers["y"][0].shape == (2, IN)
    assert fold({"x": [still]}).rank == 1


def test_no_rank_exceeds_that_of_the_layer() -> None:
    parts = [part(5, 1.0, 0), part(6, 1.0, 1)]
    found = fold({"x": parts})
    a, b = found.layers["x"]
    assert found.rank == OUT and found.error == 0
    assert torch.allclose((b @ a).double(), change(parts), atol=1e-4)


def test_every_layer_gets_the_same_rank() -> None:
    stacks = {"x": [part(2, 1.0, 0)], "y": [part(2, 1.0, 1), part(3, 1.0, 2)]}
    found = fold(stacks)
    for name, parts in stacks.items():
        a, b = found.layers[name]
        assert a.shape[0] == b.shape[1] == 5
        assert torch.allclose((b @ a).double(), change(parts), atol=1e-5)


def test_a_lower_rank_is_the_best_one_and_states_its_error() -> None:
    stacks = {"x": [part(2, 2.0, 0), part(3, 0.5, 1)], "y": [part(4, 1.0, 2)]}
    found = fold(stacks, rank=2)
    missed = whole = best = 0.0
    for name, parts in stacks.items():
        a, b = found.layers[name]
        assert a.shape == (2, IN) and b.shape == (OUT, 2)
        exact = change(parts)
        missed += float((exact - (b @ a).double()).square().sum())
        whole += float(exact.square().sum())
        best += float(torch.linalg.svdvals(exact)[2:].square().sum())
    assert (found.rank, found.exact_rank) == (2, 5)
    assert found.error == pytest.approx((missed / whole) ** 0.5, rel=1e-4)
    assert missed == pytest.approx(best, rel=1e-4)
    assert fold(stacks, rank=3).error < found.error
    assert fold(stacks, rank=64).error == 0 and fold(stacks, rank=64).rank == 5

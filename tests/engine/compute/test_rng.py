"""Random numbers depend on their key alone."""

import pytest
import torch

from rtdmd_cli.engine.compute import rng


def test_a_row_depends_on_its_own_key_only() -> None:
    whole = rng.normal((2, 3), 7, "noise", 5, range(8))
    assert whole.shape == (8, 2, 3)
    assert whole.dtype == torch.float32
    assert len(whole.flatten(1).unique(dim=0)) == 8
    halves = [
        rng.normal((2, 3), 7, "noise", 5, [0, 1, 2, 3]),
        rng.normal((2, 3), 7, "noise", 5, [4, 5, 6, 7]),
    ]
    assert torch.equal(torch.cat(halves), whole)
    assert torch.equal(rng.normal((2, 3), 7, "noise", 5, [6, 1]), whole[[6, 1]])


def test_every_part_of_the_key_counts() -> None:
    draws = [
        rng.normal((4,), seed, stream, iteration, [index])
        for seed in (0, 1)
        for stream in ("a", "b")
        for iteration in (0, 1)
        for index in (0, 1)
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 16
    first = rng.generator(0, "a", 1, 23).initial_seed()
    assert first != rng.generator(0, "a", 12, 3).initial_seed()
    assert first != rng.generator(0, "a", 1, 23, 0).initial_seed()


def test_the_global_state_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = rng.normal((3,), 0, "a", 0, [0])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(rng.normal((3,), 0, "a", 0, [0]), first)


def test_the_numbers_stay_the_same_for_ever() -> None:
    assert rng.generator(42, "noise", 3, 1).initial_seed() == 14728395447037274890  # blake2b, 8 bytes
    assert rng.integers(0, 1000, 42, "noise", 3, range(4)).tolist() == [827, 850, 543, 253]


def test_distributions() -> None:
    indices = range(2000)
    normal = rng.normal((), 0, "n", 0, indices)
    assert abs(float(normal.mean())) < 0.08
    assert abs(float(normal.std()) - 1) < 0.06
    uniform = rng.uniform(2.0, 4.0, 0, "u", 0, indices)
    assert uniform.dtype == torch.float32
    assert 2.0 <= float(uniform.min()) < 2.02
    assert 3.98 < float(uniform.max()) <= 4.0
    assert abs(float(uniform.mean()) - 3.0) < 0.05
    integers = rng.integers(1, 5, 0, "i", 0, indices)
    assert integers.dtype == torch.int64
    counts = torch.bincount(integers, minlength=6)
    assert counts[0] == counts[5] == 0
    assert int(counts[1:5].min()) > 420


def test_shared_draws() -> None:
    assert {rng.choice("abc", 0, "k", i) for i in range(30)} == set("abc")
    assert rng.choice("abc", 0, "k", 4) == rng.choice("abc", 0, "k", 4)
    with pytest.raises(ValueError, match="nothing"):
        rng.choice([], 0, "k")
    order = rng.permutation(50, 0, "p", 1)
    assert sorted(order.tolist()) == list(range(50))
    assert not torch.equal(order, rng.permutation(50, 0, "p", 2))


def test_no_samples_give_empty_tensors() -> None:
    assert rng.normal((2, 3), 0, "a", 0, []).shape == (0, 2, 3)
    assert rng.uniform(0, 1, 0, "a", 0, []).shape == (0,)
    assert rng.integers(0, 1, 0, "a", 0, []).dtype == torch.int64

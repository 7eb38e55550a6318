"""Counting on shapes: calls that were made before are looked up, and count as if they were made."""

from __future__ import annotations

import torch
from torch import nn

from rtdmd_cli.engine.compute.quantise import swap_linears
from rtdmd_cli.engine.planning import account
from rtdmd_cli.engine.planning.account import Account, call_on_shapes, form_of

META = torch.device("meta")


def counted() -> tuple[int, int, int]:
    """Two blocks forwards and backwards: peak and operations of both, and what stays alive."""
    with META:
        network = nn.Sequential(*[nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())] * 2)
        x = torch.empty(4, 8)
    with Account() as found:
        found.hold([*network.parameters(), x])
        network(x).square().mean().backward()
    return found.peak, found.flops, found.live


def test_a_call_of_a_known_form_counts_like_the_first() -> None:
    account.CALLS.clear()
    first = counted()
    known = len(account.CALLS)
    assert known > 10 and counted() == first and len(account.CALLS) == known
    assert first[1] == 2 * 3 * (2 * 4 * 8 * 8)  # each layer forwards, and for its weights and its input


def test_results_are_new_each_time_and_views_are_never_known() -> None:
    account.CALLS.clear()
    x = torch.empty(2, 6, device=META)
    with Account() as found:
        found.hold([x])
        one, two = x + 1, x + 1
        assert one.untyped_storage()._cdata != two.untyped_storage()._cdata and found.live == 3 * x.nbytes
        for _ in range(2):  # it tells of no view, and makes one
            view = torch.ops.aten._unsafe_view(x, (3, 4))
            assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
        wide = torch.ops.aten.add.Tensor(x, 1.0), torch.ops.aten.add.Tensor(x.int(), 1)
        assert [each.dtype for each in wide] == [torch.float32, torch.int32]
    assert torch.ops.aten._unsafe_view.default not in {key[0] for key in account.CALLS}  # type: ignore[index]


def test_the_default_dtype_is_part_of_a_call() -> None:
    """Libraries build a network under another one; what is made without a tensor has it."""
    before = torch.get_default_dtype()
    try:
        with Account():
            for dtype in (torch.float32, torch.bfloat16):
                torch.set_default_dtype(dtype)
                assert torch.empty(3, 5, device=META).dtype == dtype
    finally:
        torch.set_default_dtype(before)


def test_numbers_and_writes_are_always_computed() -> None:
    with Account():
        assert (torch.ones(2) + 1).tolist() == [2.0, 2.0]
        assert (torch.ones(2) + 2).tolist() == [3.0, 3.0]
    assert call_on_shapes(torch.ops.aten.add_.Tensor, (torch.empty(2, device=META), 1), {}) is None
    assert form_of([1, 2.0]) != form_of([1, 2]) != form_of([True, 2])


def test_a_layer_in_4_bits_counts_like_a_plain_one_with_and_without_gradient() -> None:
    """Without gradient bitsandbytes multiplies by the packed weight in one call, which torch has no formula for."""
    packed = nn.Sequential(nn.Linear(64, 128, bias=False, dtype=torch.float32))
    swap_linears(packed, "nf4", torch.device("cpu"))
    for needs in (False, True):
        with Account() as found:
            packed(torch.ones(2, 3, 64, requires_grad=needs))
        assert found.flops == 2 * 6 * 64 * 128

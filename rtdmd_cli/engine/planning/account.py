"""What a block of torch code holds and computes: bytes of live storages, their peak, and floating-point operations."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

ATEN = torch.ops.aten
FUSED, FUSED_BACKWARD = (
    ATEN._scaled_dot_product_flash_attention_for_cpu,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward,
)


class Account(TorchDispatchMode):
    """Within it, every tensor that is made is counted, on any device, until its memory is given back.

    live, peak: bytes of what was made inside, and of what `hold` was given. flops: of matrix products, convolutions and
    attention, two for each multiplication and addition.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._sizes: dict[int, int] = {}

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that are there already; the bytes of those that were not counted yet."""
        before = self.live
        for tensor in tensors:
            self._count(tensor)
        return self.live - before

    @contextmanager
    def beside(self, tensors: Sequence[Tensor]) -> Iterator[int]:
        """Within the block these are counted, unless they were; their bytes."""
        known = set(self._storages)
        yield self.hold(tensors)
        for key in {tensor.untyped_storage()._cdata for tensor in tensors} - known:
            self.live -= self._sizes.pop(key)
            del self._storages[key]

    def restart(self) -> None:
        """A new peak, from what is alive now; no operations yet."""
        self.peak, self.flops = self.live, 0

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def gone(_: Any) -> None:
            self.live -= self._sizes.pop(key)
            del self._storages[key]

        self._storages[key], self._sizes[key] = weakref.ref(storage, gone), size
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor):
                self._count(each)
        packet = function._overloadpacket
        if packet is FUSED:
            self.flops += sdpa_flop_count(*(each.shape for each in args[:3]))
        elif packet is FUSED_BACKWARD:
            self.flops += sdpa_backward_flop_count(*(each.shape for each in args[:4]))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=made)
        return made


@contextmanager
def fused_attention() -> Iterator[None]:
    """Within it, attention on the `meta` device keeps the fused form that it has on a card, memory and all.

    torch would take it apart there, into products whose intermediate results grow with the square of the tokens. Masks
    and grouped keys are left out: a card's kernel reads them in place. It takes torch's function's place, because a mode of
    torch is off within a backward pass, where checkpointing computes attention again.
    """
    plain = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Tensor:
        if not query.is_meta:
            return plain(query, key, value, *rest, **named)
        groups = query.shape[-3] // key.shape[-3]
        if groups > 1:
            key, value = (each.repeat_interleave(groups, dim=-3) for each in (key, value))
        made: Tensor = FUSED(query, key, value)[0]
        return made

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain

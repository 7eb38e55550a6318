"""What a block of torch code holds and computes: bytes of live storages, their peak, and floating-point operations."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
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

PACKED_PRODUCT = "bitsandbytes::gemm_4bit"
"""Of a layer in 4 bits, without gradient."""


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
        named = kwargs or {}
        key = call_on_shapes(function, args, named)
        known = None if key is None else CALLS.get(key)
        if known is None:
            made = function(*args, **named)
            flops = flops_of(function._overloadpacket, args, named, made)
            if key is not None and are_new(tree_leaves(made), tree_leaves((args, named))):
                forms = [(each.shape, each.stride(), each.dtype) for each in tree_leaves(made)]
                CALLS[key] = Call(forms, isinstance(made, Tensor), flops)
        else:
            made, flops = known.again(), known.flops
        for each in (made,) if isinstance(made, Tensor) else tree_leaves(made):
            if isinstance(each, Tensor):
                self._count(each)
        self.flops += flops
        return made


@dataclass(frozen=True)
class Call:
    """What a function made of inputs of some form: shape, strides and format of each result, whether there is only one
    (else a tuple), and the operations."""

    forms: Sequence[tuple[torch.Size, tuple[int, ...], torch.dtype]]
    alone: bool
    flops: int

    def again(self) -> Any:
        """New results, on `meta`."""
        made = [
            torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            for shape, stride, dtype in self.forms
        ]
        return made[0] if self.alone else tuple(made)


CALLS: dict[Hashable, Call] = {}
"""By what `call_on_shapes` names: every network and stage that is planned in this process adds to it."""


def call_on_shapes(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable | None:
    """What names a call whose results depend on its inputs' forms (and torch's default dtype) alone; None for any other.

    Such a function writes to no input and makes new tensors, and its tensors are on `meta`. The blocks of a network are
    alike, so most calls were made before; torch's own way to the form of a result, in Python, takes a hundred times as
    long as looking it up.
    """
    if not makes_new(function):
        return None
    try:
        return function, form_of(args), form_of(tuple(kwargs.items())), torch.get_default_dtype()
    except NotOnShapes:
        return None


class NotOnShapes(Exception):
    """A tensor with numbers in it."""


def form_of(value: Any) -> Hashable:
    """What a call's result depends on in an argument. Its type too: 1, 1.0 and True are equal, but make other formats.

    NotOnShapes where a tensor is not on `meta`.
    """
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise NotOnShapes
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple([form_of(each) for each in value])
    return type(value), value


@cache
def makes_new(function: Any) -> bool:
    """Whether a function of torch says that it writes to no input and that no result is a view of one."""
    schema = function._schema
    return not any(each.alias_info for each in (*schema.arguments, *schema.returns))


def are_new(results: Sequence[Any], inputs: Sequence[Any]) -> bool:
    """Whether all results are tensors on `meta` with a storage of their own: some functions don't tell that they share one."""
    given = {each.untyped_storage()._cdata for each in inputs if isinstance(each, Tensor)}
    return all(
        isinstance(each, Tensor) and each.is_meta and each.untyped_storage()._cdata not in given
        for each in results
    )


def flops_of(packet: Any, args: Sequence[Any], kwargs: Mapping[str, Any], made: Any) -> int:
    """Operations of a call, by torch's formulas; 0 where it has none."""
    if packet._qualified_op_name == PACKED_PRODUCT:  # x [..., in], the packed weight, its shape [out, in]
        return 2 * int(args[0].numel()) * int(args[2][0])
    if packet is FUSED:
        return int(sdpa_flop_count(*(each.shape for each in args[:3])))
    if packet is FUSED_BACKWARD:
        return int(sdpa_backward_flop_count(*(each.shape for each in args[:4])))
    return int(flop_registry[packet](*args, **kwargs, out_val=made)) if packet in flop_registry else 0


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

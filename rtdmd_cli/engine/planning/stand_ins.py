"""Stand-ins of the same bytes for what can't be made on shapes alone: layers in 8 or 4 bits, 8-bit optimiser states, and
torch's autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtdmd_cli.config.schema import HardwareConfig
from rtdmd_cli.engine.compute.blocks import repeated_blocks
from rtdmd_cli.engine.compute.float32_products import CPU, emulates_bf16
from rtdmd_cli.engine.compute.optim import Choice
from rtdmd_cli.engine.compute.quantise import Base

NF4_BLOCK, NF4_NESTED = 64, 256
"""Weights that share a scale of 8 bits, and scales that share one of 32 (QLoRA's double quantisation)."""
ADAM_BLOCK, ADAM_SMALLEST = 256, 4096
"""Elements of an 8-bit state that share a scale of 32 bits, and the size of the smallest tensor with such states."""


def quantise(network: nn.Module, base: Base, blocks_only: bool = True, wide: bool = False) -> None:
    """As `compute.quantise.place` and, without `blocks_only`, `shrink_encoder`, on shapes. wide: multiplied in float32."""
    if base == "plain":
        return
    for parent in repeated_blocks(network) if blocks_only else [network]:
        _swap(parent, base, wide)


def _swap(parent: nn.Module, base: Base, wide: bool) -> None:
    for name, child in parent.named_children():
        if type(child) is nn.Linear:
            setattr(parent, name, Stored(child, base, wide))
        else:
            _swap(child, base, wide)


def multiplies_wide(hardware: HardwareConfig, dtype: torch.dtype) -> bool:
    """Whether layers in `dtype` multiply in float32, as `backbones.loading` has it: on a CPU that emulates bf16 products.

    Only where a preset says `device: cpu`; `auto` is planned as a card on every machine.
    """
    return hardware.device == "cpu" and emulates_bf16(CPU, dtype)


@dataclass(frozen=True)
class Unpacks:
    """How packed weights [out, in] are made into those of a product.

    rows: each row has a scale, by which results and gradients are multiplied. wide: the product is made in float32.
    """

    shape: tuple[int, int]
    rows: bool
    wide: bool

    def product_dtype(self, x: Tensor) -> torch.dtype:
        """Of a product with x."""
        return torch.float32 if self.wide else x.dtype


class Stored(nn.Linear):
    """A frozen linear layer whose weights are kept in 8 or 4 bits and unpacked for each product."""

    def __init__(self, linear: nn.Linear, base: Base, wide: bool) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.unpacks = Unpacks((self.out_features, self.in_features), base == "int8", wide)
        count, scales = linear.weight.numel(), linear.out_features * 4
        if base == "nf4":
            blocks = -(-count // NF4_BLOCK)
            count, scales = -(-count // 2), blocks + -(-blocks // NF4_NESTED) * 4
        device = linear.weight.device
        packed = torch.empty(count, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8, device=device))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.weight, self.unpacks)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """x W^T and its gradient in x; W is unpacked in both and not kept in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, unpacks: Unpacks) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.unpacks = unpacks
        dtype = unpacks.product_dtype(x)
        return (x.to(dtype) @ packed.new_empty(unpacks.shape, dtype=dtype).t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (packed,) = ctx.saved_tensors
        gradient, unpacks = gradients[0], ctx.unpacks
        dtype = unpacks.product_dtype(gradient)
        scaled = gradient.to(dtype, copy=unpacks.rows)
        return (scaled @ packed.new_empty(unpacks.shape, dtype=dtype)).to(gradient.dtype), None, None


def optimizer_bytes(parameters: Sequence[Tensor], choice: Choice) -> int:
    """Of AdamW's two states for each parameter."""
    if choice == "adamw":
        return sum(8 * parameter.numel() for parameter in parameters)
    small = [p.numel() for p in parameters if p.numel() < ADAM_SMALLEST]
    large = [p.numel() for p in parameters if p.numel() >= ADAM_SMALLEST]
    return 8 * sum(small) + sum(2 * (count + 4 * -(-count // ADAM_BLOCK)) for count in large)


PRODUCTS = ("linear", "conv2d", "scaled_dot_product_attention")
"""Of torch's functions those that autocast computes in the lower format, as far as the families' transformers use them."""
NORMS = ("layer_norm", "group_norm", "rms_norm")
"""Those that it computes in float32 on a card."""


@contextmanager
def autocast_on_shapes(dtype: torch.dtype | None) -> Iterator[None]:
    """Within it, products on the `meta` device are made as within autocast to `dtype`; None changes nothing.

    Torch has no autocast there. These take the place of torch's functions for the same reason as in `fused_attention`, which
    is entered first. Where weights and inputs are in `dtype` already, as in the base and the VAE, nothing is cast.
    """
    if dtype is None:
        yield
        return
    own = {name: getattr(F, name) for name in (*PRODUCTS, *NORMS)}
    autocast = torch.autocast
    for name in PRODUCTS:
        setattr(F, name, _cast(own[name], lambda tensor: tensor.to(dtype)))
    for name in NORMS:
        setattr(F, name, _cast(own[name], Tensor.float))
    setattr(torch, "autocast", lambda *_, **__: nullcontext())  # noqa: B010 - a class to mypy
    try:
        yield
    finally:
        setattr(torch, "autocast", autocast)  # noqa: B010
        for name, function in own.items():
            setattr(F, name, function)


def _cast(function: Callable[..., Any], cast: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """The function, with its tensors of numbers on `meta` cast first, where one of them is in float32."""

    def call(*given: Any, **named: Any) -> Any:
        tensors = [each for each in (*given, *named.values()) if isinstance(each, Tensor)]
        if not any(each.is_meta and each.dtype == torch.float32 for each in tensors):
            return function(*given, **named)
        made = [_number(each, cast) for each in given]
        return function(*made, **{key: _number(each, cast) for key, each in named.items()})

    return call


def _number(value: Any, cast: Callable[[Tensor], Tensor]) -> Any:
    return cast(value) if isinstance(value, Tensor) and value.is_floating_point() else value

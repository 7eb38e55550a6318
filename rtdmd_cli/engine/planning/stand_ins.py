"""Stand-ins of the same bytes for what can't be made on shapes alone: layers in 8 or 4 bits, and 8-bit optimiser states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rtdmd_cli.engine.compute.blocks import repeated_blocks
from rtdmd_cli.engine.compute.optim import Choice
from rtdmd_cli.engine.compute.quantise import Base

NF4_BLOCK, NF4_NESTED = 64, 256
"""Weights that share a scale of 8 bits, and scales that share one of 32 (QLoRA's double quantisation)."""
ADAM_BLOCK, ADAM_SMALLEST = 256, 4096
"""Elements of an 8-bit state that share a scale of 32 bits, and the size of the smallest tensor with such states."""


def quantise(network: nn.Module, base: Base, blocks_only: bool = True) -> None:
    """As `compute.quantise.place` and, without `blocks_only`, `shrink_encoder`, on shapes."""
    if base == "plain":
        return
    for parent in repeated_blocks(network) if blocks_only else [network]:
        _swap(parent, base)


def _swap(parent: nn.Module, base: Base) -> None:
    for name, child in parent.named_children():
        if type(child) is nn.Linear:
            setattr(parent, name, Stored(child, base))
        else:
            _swap(child, base)


class Stored(nn.Linear):
    """A frozen linear layer whose weights are kept in 8 or 4 bits and unpacked for each product."""

    def __init__(self, linear: nn.Linear, base: Base) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.unpacked = linear.weight.dtype
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
        shape = (self.out_features, self.in_features)
        y: Tensor = _Product.apply(x, self.weight, shape, self.unpacked)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """x W^T and its gradient in x; W is unpacked in both and not kept in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.unpacked = (shape, dtype)
        return x @ packed.new_empty(shape, dtype=x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (packed,) = ctx.saved_tensors
        shape, _ = ctx.unpacked
        gradient = gradients[0]
        return gradient @ packed.new_empty(shape, dtype=gradient.dtype), None, None, None


def optimizer_bytes(parameters: Sequence[Tensor], choice: Choice) -> int:
    """Of AdamW's two states for each parameter."""
    if choice == "adamw":
        return sum(8 * parameter.numel() for parameter in parameters)
    small = [p.numel() for p in parameters if p.numel() < ADAM_SMALLEST]
    large = [p.numel() for p in parameters if p.numel() >= ADAM_SMALLEST]
    return 8 * sum(small) + sum(2 * (count + 4 * -(-count // ADAM_BLOCK)) for count in large)

"""bf16 weights multiplied in float32, for processors that multiply bf16 by emulation.

On a Zen 3 core a product of SD3's sizes ran at 8.6 GFLOP/s in bf16 and at 50.6 in float32, a convolution of its VAE at
under 0.3 and at 68.8. The weights stay in bf16; a layer's are widened for its own product and not kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtdmd_cli.engine.compute.mixed import multiplies_bf16

CPU = torch.device("cpu")
WIDENING = ("cpu", "meta")
"""Devices on which the layers of `multiply_in_float32` do so; on `meta` they stand for those on a CPU."""


def emulates_bf16(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products in `dtype` on `device` are bf16 ones that a CPU computes without instructions for them."""
    return device.type == "cpu" and dtype == torch.bfloat16 and not multiplies_bf16(device)


def product_dtype(x: Tensor) -> torch.dtype:
    """In which dtype a frozen layer multiplies `x`: float32 where bf16 products are emulated, else that of `x`."""
    return torch.float32 if emulates_bf16(x.device, x.dtype) else x.dtype


def multiply_in_float32(parent: nn.Module) -> None:
    """Let the plain bf16 linear layers and convolutions inside `parent` compute in float32 on the devices of WIDENING.

    What goes in and out keeps its dtype, the parameters and their names stay as they are. To be called before adapters
    are put on.
    """
    for name, child in parent.named_children():
        if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16:
            setattr(
                parent,
                name,
                _sharing(child, Float32Linear(child.in_features, child.out_features, device="meta")),
            )
        elif type(child) is nn.Conv2d and child.weight.dtype == torch.bfloat16:
            setattr(parent, name, _sharing(child, _empty_convolution(child)))
        else:
            multiply_in_float32(child)


def _sharing(old: nn.Linear | nn.Conv2d, new: nn.Linear | nn.Conv2d) -> nn.Module:
    """The new layer with the old one's parameters."""
    new.weight, new.bias = old.weight, old.bias
    return new.train(old.training)


def _empty_convolution(old: nn.Conv2d) -> Float32Conv2d:
    return Float32Conv2d(
        old.in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type] # tuples of two, which torch's stubs know as tuples of any length
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        old.groups,
        padding_mode=old.padding_mode,
        device="meta",
    )


def _widened(x: Tensor) -> bool:
    return x.device.type in WIDENING and x.dtype == torch.bfloat16


class Float32Linear(nn.Linear):
    """x [..., in] -> [..., out] in x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        if not _widened(x):
            return super().forward(x)
        y: Tensor = _Product.apply(x, self.weight)
        return y if self.bias is None else y + self.bias


class Float32Conv2d(nn.Conv2d):
    """x [B,C,H,W] in x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        if not _widened(x):
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        y: Tensor = self._conv_forward(x.float(), self.weight.float(), bias)
        return y.to(x.dtype)


class _Product(torch.autograd.Function):
    """x W^T and its gradients; the wide W is not kept in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return F.linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].float()
        to_x = (gradient @ weight.float()).to(gradients[0].dtype) if ctx.needs_input_grad[0] else None
        if x is None:
            return to_x, None
        rows = gradient.flatten(0, -2).t() @ x.float().flatten(0, -2)
        return to_x, rows.to(weight.dtype)

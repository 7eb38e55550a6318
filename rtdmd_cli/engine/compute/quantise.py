"""A frozen base in 8 or 4 bits: the linear layers of a transformer's repeated blocks, by bitsandbytes.

    int8    a scale for each output row (vector-wise absmax), 8-bit weights
    nf4     a scale for each 64 weights, itself in 8 bits (QLoRA's NF4 with double quantisation)

One path for CPU and CUDA. Only the blocks' layers are swapped: they hold nearly all weights. What stands before and
after them (embedders of picture, text and time, modulations shared by all blocks, the last norm and projection) is
small and sits where an error reaches every block or the result directly, so it stays as it is. Norms and biases stay
too. Activations are never quantised, and a gradient passes to the input.
"""

from __future__ import annotations

from copy import copy
from typing import Any, Literal, TypeAlias

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn
from torch.nn import functional as F

from rtdmd_cli.engine.compute.blocks import repeated_blocks
from rtdmd_cli.engine.compute.float32_products import emulates_bf16, product_dtype
from rtdmd_cli.errors import EnvironmentFailure

Quantised: TypeAlias = Literal["int8", "nf4"]
Base: TypeAlias = Literal["plain"] | Quantised
QUANTISED: tuple[Quantised, ...] = ("int8", "nf4")


def place(transformer: nn.Module, base: Base, device: torch.device) -> None:
    """Move a transformer to `device`, its blocks' linear layers quantised on the way unless `base` is plain.

    Works layer by layer: the device never holds more than one unquantised layer. Call it before adapters are added.
    EnvironmentFailure for a quantised base on a device other than cpu and cuda.
    """
    if base != "plain":
        _require_device(base, "base", "hardware.base to plain", device)
        for block in repeated_blocks(transformer):
            swap_linears(block, base, device)
        transformer.is_loaded_in_4bit = base == "nf4"  # type: ignore[assignment]  # peft reads these two
        transformer.is_loaded_in_8bit = base == "int8"  # type: ignore[assignment]
    transformer.to(device)


def shrink_encoder(encoder: nn.Module, device: torch.device) -> None:
    """Put a text encoder's linear layers on `device` in 8 bits; its other layers stay where they are.

    EnvironmentFailure as `place`.
    """
    _require_device("int8", "text encoders", "hardware.text_encoder to cpu", device)
    swap_linears(encoder, "int8", device)


def _require_device(base: Base, what: str, instead: str, device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        raise EnvironmentFailure(
            f"The {what} can't be quantised on {device.type}: {base} is for cpu and cuda alone.",
            f"Set {instead}.",
        )


def swap_linears(parent: nn.Module, base: Base, device: torch.device) -> None:
    """Put quantised layers on `device` in the place of every plain linear layer inside `parent`; base: not plain."""
    for name, child in parent.named_children():
        if type(child) is nn.Linear:
            quantised = _int8(child, device) if base == "int8" else _nf4(child, device)
            setattr(parent, name, quantised.train(child.training).requires_grad_(False))
        else:
            swap_linears(child, base, device)


def _nf4(linear: nn.Linear, device: torch.device) -> nn.Module:
    layer = Nf4Linear(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    )
    if linear.bias is not None:
        layer.bias = linear.bias
    # On some processors the first call without gradient would repack the weights for calls without gradient only.
    layer.support_avx512bf16_for_cpu = False
    return layer.to(device)


class Nf4Linear(Linear4bit):
    """bitsandbytes' 4-bit layer: x [..., in] -> [..., out] in x's dtype.

    Blocks of scales run on from row to row, but with AVX-512 the CPU kernel starts a new block with each row, so rows that
    end inside a block come out wrong. Such a layer's weights are dequantised as one row here, and kept until the
    backward pass. In large models every row is a whole number of blocks.
    """

    def forward(self, x: Tensor) -> Tensor:
        state: Any = self.weight.quant_state  # type: ignore[attr-defined] # bitsandbytes puts it there
        whole_rows = x.device.type != "cpu" or self.in_features % state.blocksize == 0
        if whole_rows and emulates_bf16(x.device, x.dtype):
            wide = copy(state)
            wide.dtype = torch.float32
            y: Tensor = _WideNf4Product.apply(x, self.weight.data, wide)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        if whole_rows:
            output: Tensor = super().forward(x)
            return output
        one_row = copy(state)
        one_row.shape = torch.Size((1, state.shape.numel()))
        weight = dequantize_4bit(self.weight.data, one_row).reshape(state.shape)
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


class _WideNf4Product(torch.autograd.Function):
    """x W^T and its gradient in x, multiplied in float32, into which W is unpacked in both; it is not kept in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, state: Any) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.state = state
        return F.linear(x.float(), dequantize_4bit(packed, state)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (packed,), gradient = ctx.saved_tensors, gradients[0]
        return (gradient.float() @ dequantize_4bit(packed, ctx.state)).to(gradient.dtype), None, None


def _int8(linear: nn.Linear, device: torch.device) -> nn.Module:
    layer = Int8Linear(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        has_fp16_weights=False,
        device="meta",
    )
    weight = linear.weight.data.cpu()  # bitsandbytes rounds what leaves the CPU, and nothing else
    layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if linear.bias is not None:
        layer.bias = linear.bias
    placed: Int8Linear = layer.to(device)
    placed.init_8bit_state()
    return placed


class Int8Linear(Linear8bitLt):
    """bitsandbytes' 8-bit layer, multiplied by the dequantised weights: x [..., in] -> [..., out] in x's dtype.

    bitsandbytes' own product also quantises the activations, through float16, whose range a transformer's activations
    can leave, and keeps them until the backward pass even with checkpointing.
    """

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Int8Product.apply(x, self.state.CB, self.state.SCB)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Int8Product(torch.autograd.Function):
    """x W^T and its gradient in x; W is int8 [out, in] times scale [out] / 127, in the product's dtype for the product alone.

    Every whole number of 8 bits is exact in bf16, and the scale is that of a row, so it multiplies the result: one pass
    over the weights less than scaling them, and no rounding of a scaled weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        wide = product_dtype(x)
        return (x.to(wide) @ weight.to(wide).t()).mul_(scale / 127).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        weight, scale = ctx.saved_tensors
        gradient, wide = gradients[0], product_dtype(gradients[0])
        scaled = gradient.to(wide, copy=True).mul_(scale / 127)
        return (scaled @ weight.to(wide)).to(gradient.dtype), None, None

"""The joint attention of Stable Diffusion 3 on a CPU, in fewer and larger products.

Picture and text each have queries, keys and values of their own: six products in diffusers, two here, with one copy that
brings both together. In the last block, whose text nothing reads any more, the text's queries are left out. It pays with
torch's fused attention, which reads the joint projections where they lie; the plain one (`device.plain_attention`) would
copy them first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional as F

from rtdmd_cli.engine.compute.device import is_float32_on_cpu

OF_PICTURE = ("to_q", "to_k", "to_v")
OF_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj")


def join_projections(parent: nn.Module, wanted: Callable[[], bool]) -> None:
    """Let the joint attention layers inside `parent` project in two products, in all later passes where `wanted()`.

    Of float32 on a CPU alone, with fused attention, and only layers without adapters, quantised weights and norms.
    """
    for layer in parent.modules():
        if isinstance(layer, Attention) and type(layer.processor) is JointAttnProcessor2_0 and _plain(layer):
            layer.set_processor(JoinedProjections(layer.processor, wanted))


def _plain(layer: Attention) -> bool:
    if layer.added_kv_proj_dim is None:  # attention of the picture alone
        return False
    projections = [layer.get_submodule(name) for name in (*OF_PICTURE, *OF_TEXT)]
    norms = (layer.norm_q, layer.norm_k, layer.norm_added_q, layer.norm_added_k)
    return all(type(each) is nn.Linear for each in projections) and norms == (None,) * 4


class JoinedProjections:
    """A processor of diffusers' `Attention`; `stock` is the one that it stands for, and calls where it isn't wanted."""

    def __init__(self, stock: JointAttnProcessor2_0, wanted: Callable[[], bool]) -> None:
        self.stock = stock
        self._wanted = wanted

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [B,N,W] of the picture and encoder_hidden_states [B,M,W] of the text: both, of the same shapes."""
        if torch.compiler.is_compiling() or not self._pays(hidden_states):
            answer: tuple[Tensor, Tensor] = self.stock(attn, hidden_states, encoder_hidden_states)
            return answer
        picture = _projected(hidden_states, attn, OF_PICTURE)
        if attn.context_pre_only:
            query, rest = picture.tensor_split([picture.shape[2] // 3], dim=2)
            text = _projected(encoder_hidden_states, attn, OF_TEXT[1:])
            (q,) = _heads(query, attn.heads, 1)
            k, v = _heads(torch.cat([rest, text], dim=1), attn.heads, 2)
        else:
            text = _projected(encoder_hidden_states, attn, OF_TEXT)
            q, k, v = _heads(torch.cat([picture, text], dim=1), attn.heads, 3)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if attn.context_pre_only:
            return _out(attn, mixed), encoder_hidden_states  # the block passes the text over
        of_picture, of_text = mixed.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        return _out(attn, of_picture), attn.to_add_out(of_text)

    def _pays(self, x: Tensor) -> bool:
        fused = torch.backends.cuda.flash_sdp_enabled()  # of the CPU too, in spite of its name
        return self._wanted() and fused and is_float32_on_cpu(x)


def _projected(x: Tensor, attn: Any, names: tuple[str, ...]) -> Tensor:
    """x [B,L,W] through several linear layers at once: [B, L, their widths one after another]."""
    layers = [attn.get_submodule(name) for name in names]
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return F.linear(x, weight, bias)


def _heads(x: Tensor, heads: int, count: int) -> tuple[Tensor, ...]:
    """[B, L, count * W] as `count` views of [B, heads, L, W / heads]."""
    parts: Tensor = x.unflatten(2, (count, heads, -1)).permute(2, 0, 3, 1, 4)
    return parts.unbind(0)


def _out(attn: Any, x: Tensor) -> Tensor:
    for layer in attn.to_out:
        x = layer(x)
    return x

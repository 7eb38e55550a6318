"""Transformers in single files by the names of the original releases and of ComfyUI."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
DOUBLE = {
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "img_attn.proj.weight": "attn.to_out.0.weight",
    "img_mlp.0.weight": "ff.linear_in.weight",
    "img_mlp.2.weight": "ff.linear_out.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    "txt_attn.proj.weight": "attn.to_add_out.weight",
    "txt_mlp.0.weight": "ff_context.linear_in.weight",
    "txt_mlp.2.weight": "ff_context.linear_out.weight",
}
OUTSIDE = {
    "img_in.weight": "x_embedder.weight",
    "txt_in.weight": "context_embedder.weight",
    "time_in.in_layer.weight": "time_guidance_embed.timestep_embedder.linear_1.weight",
    "time_in.out_layer.weight": "time_guidance_embed.timestep_embedder.linear_2.weight",
    "double_stream_modulation_img.lin.weight": "double_stream_modulation_img.linear.weight",
    "double_stream_modulation_txt.lin.weight": "double_stream_modulation_txt.linear.weight",
    "single_stream_modulation.lin.weight": "single_stream_modulation.linear.weight",
    "final_layer.linear.weight": "proj_out.weight",
}


def flux2_as_released(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A FLUX.2 of one double block: query, key and value are one matrix there."""
    ours, theirs = dict(tensors), {}
    for key in list(ours):
        if key.startswith("single_transformer_blocks."):
            number, _, rest = key.removeprefix("single_transformer_blocks.").partition(".attn.")
            new = {"to_qkv_mlp_proj.weight": "linear1.weight", "to_out.weight": "linear2.weight"}
            new |= {f"norm_{q}.weight": f"norm.{w}_norm.scale" for q, w in (("q", "query"), ("k", "key"))}
            theirs[f"single_blocks.{number}.{new[rest]}"] = ours.pop(key)
    block = "transformer_blocks.0"
    for kind, letters in (("img_attn", ("to_q", "to_k", "to_v")), ("txt_attn", ADDED)):
        parts = [ours.pop(f"{block}.attn.{each}.weight") for each in letters]
        theirs[f"double_blocks.0.{kind}.qkv.weight"] = torch.cat(parts)
    for new_key, old in DOUBLE.items():
        theirs[f"double_blocks.0.{new_key}"] = ours.pop(f"{block}.{old}")
    scale, shift = ours.pop("norm_out.linear.weight").chunk(2)
    theirs["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    for new_key, old in OUTSIDE.items():
        theirs[new_key] = ours.pop(old)
    assert not ours, ours.keys()
    return theirs


def zimage_in_comfyui(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value in one matrix, other names of a few layers, the rest as in diffusers."""
    ours, theirs = dict(tensors), {}
    for key in [key for key in ours if key.endswith("attention.to_q.weight")]:
        start = key.removesuffix("to_q.weight")
        theirs[f"{start}qkv.weight"] = torch.cat([ours.pop(f"{start}to_{each}.weight") for each in "qkv"])
        theirs[f"{start}out.weight"] = ours.pop(f"{start}to_out.0.weight")
        for each in "qk":
            theirs[f"{start}{each}_norm.weight"] = ours.pop(f"{start}norm_{each}.weight")
    for key in [key for key in ours if ".2-1." in key]:
        theirs[key.removeprefix("all_").replace(".2-1", "")] = ours.pop(key)
    assert len(theirs) > 10
    return theirs | ours


FLUX1_CONFIG = {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}
"""Of diffusers' FluxTransformer2DModel, whose other defaults are FLUX.1's; its converter knows no other widths."""


def write_flux1_as_released(path: Path, norms: str) -> Path:
    """A FLUX.1 of two blocks at its real widths, 0.4 GB of zeros in 8 bits that take no room on the disk; returns `path`.

    norms: what the norms of queries and keys are called, `scale` or `weight`.
    """
    header, end = {}, 0
    for name, shape in _flux1_shapes(norms).items():
        size = torch.Size(shape).numel()
        header[name] = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def _flux1_shapes(norms: str) -> dict[str, list[int]]:
    width, head = 3072, 128
    linear = {
        "img_in": (width, 64),
        "txt_in": (width, 4096),
        "final_layer.linear": (64, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "single_blocks.0.linear1": (7 * width, width),
        "single_blocks.0.linear2": (width, 5 * width),
        "single_blocks.0.modulation.lin": (3 * width, width),
    }
    for name, size in (("time", 256), ("guidance", 256), ("vector", 768)):
        linear |= {f"{name}_in.in_layer": (width, size), f"{name}_in.out_layer": (width, width)}
    for part in ("double_blocks.0.img", "double_blocks.0.txt"):
        linear |= {f"{part}_mod.lin": (6 * width, width), f"{part}_attn.qkv": (3 * width, width)}
        linear |= {f"{part}_attn.proj": (width, width), f"{part}_mlp.0": (4 * width, width)}
        linear[f"{part}_mlp.2"] = (width, 4 * width)
    shapes = {f"{name}.weight": list(shape) for name, shape in linear.items()}
    shapes |= {f"{name}.bias": [shape[0]] for name, shape in linear.items()}
    normed = ("double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0")
    return shapes | {f"{each}.norm.{of}_norm.{norms}": [head] for each in normed for of in ("query", "key")}

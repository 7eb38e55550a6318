"""CLIPs in the layout of open_clip, as transformers' CLIPModel.

open_clip names per block `ln_1`, `attn` (query, key and value in one `in_proj`), `ln_2`, `mlp.c_fc`, `mlp.c_proj`;
its projections are used as x @ W, where transformers has Linears (x @ W.T). All sizes are read off the tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import CLIPConfig

from rtdmd_cli.engine.judges.features import LEGACY_EOS
from rtdmd_cli.engine.storage.tensors import check_tensors
from rtdmd_cli.errors import DataError

# All dicts: open_clip's name -> transformers' name.
TOWERS = {
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
}
BLOCK = {
    "ln_1.weight": "layer_norm1.weight",
    "ln_1.bias": "layer_norm1.bias",
    "attn.out_proj.weight": "self_attn.out_proj.weight",
    "attn.out_proj.bias": "self_attn.out_proj.bias",
    "ln_2.weight": "layer_norm2.weight",
    "ln_2.bias": "layer_norm2.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight",
    "mlp.c_proj.bias": "mlp.fc2.bias",
}
OUTSIDE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers' spelling
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
PROJECTIONS = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}


def to_transformers(tensors: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """The tensors of an open_clip ViT under the keys of CLIPModel, dtypes as they are.

    DataError that names a missing, unexpected or misshapen tensor of `what`.
    """
    check_tensors(tensors, _shapes(tensors, what), what)
    ours = {new: tensors[old] for old, new in OUTSIDE.items()}
    ours |= {new: tensors[old].T for old, new in PROJECTIONS.items()}
    for old_tower, new_tower in TOWERS.items():
        for layer in range(_depth(tensors, old_tower)):
            old, new = f"{old_tower}.{layer}", f"{new_tower}.{layer}"
            ours |= {f"{new}.{b}": tensors[f"{old}.{a}"] for a, b in BLOCK.items()}
            for kind in ("weight", "bias"):
                parts = tensors[f"{old}.attn.in_proj_{kind}"].chunk(3)
                ours |= {
                    f"{new}.self_attn.{x}_proj.{kind}": part for x, part in zip("qkv", parts, strict=True)
                }
    return ours


def clip_config(ours: dict[str, Tensor], heads: int, activation: str) -> CLIPConfig:
    """The CLIPConfig for the tensors that `to_transformers` returns.

    heads: of both towers; activation: transformers' name ("gelu"). Neither can be read off the tensors.
    """
    text, vision = "text_model.embeddings", "vision_model.embeddings"
    vocabulary, text_width = ours[f"{text}.token_embedding.weight"].shape
    vision_width, _, patch, _ = ours[f"{vision}.patch_embedding.weight"].shape
    patches = len(ours[f"{vision}.position_embedding.weight"]) - 1
    common = {"num_attention_heads": heads, "hidden_act": activation}
    return CLIPConfig(
        text_config={
            **common,
            **_tower(ours, "text_model", text_width),
            "vocab_size": vocabulary,
            "max_position_embeddings": len(ours[f"{text}.position_embedding.weight"]),
            "eos_token_id": LEGACY_EOS,  # open_clip reads the text at its highest token id
        },
        vision_config={
            **common,
            **_tower(ours, "vision_model", vision_width),
            "image_size": math.isqrt(patches) * patch,
            "patch_size": patch,
        },
        projection_dim=len(ours["visual_projection.weight"]),
    )


def _tower(ours: dict[str, Tensor], tower: str, width: int) -> dict[str, int]:
    layers = f"{tower}.encoder.layers"
    return {
        "hidden_size": width,
        "intermediate_size": len(ours[f"{layers}.0.mlp.fc1.weight"]),
        "num_hidden_layers": _depth(ours, layers),
    }


def _shapes(tensors: dict[str, Tensor], what: str) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, by a few that give the sizes."""
    vocabulary, text_width = _size(tensors, "token_embedding.weight", 2, what)
    length, _ = _size(tensors, "positional_embedding", 2, what)
    vision_width, channels, patch, _ = _size(tensors, "visual.conv1.weight", 4, what)
    positions, _ = _size(tensors, "visual.positional_embedding", 2, what)
    _, projection = _size(tensors, "text_projection", 2, what)
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "token_embedding.weight": (vocabulary, text_width),
        "positional_embedding": (length, text_width),
        "ln_final.weight": (text_width,),
        "ln_final.bias": (text_width,),
        "text_projection": (text_width, projection),
        "visual.class_embedding": (vision_width,),
        "visual.conv1.weight": (vision_width, channels, patch, patch),
        "visual.positional_embedding": (math.isqrt(positions - 1) ** 2 + 1, vision_width),
        "visual.proj": (vision_width, projection),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"visual.{norm}.{kind}": (vision_width,) for kind in ("weight", "bias")}
    for tower, width in zip(TOWERS, (vision_width, text_width), strict=True):
        hidden, _ = _size(tensors, f"{tower}.0.mlp.c_fc.weight", 2, what)
        for layer in range(_depth(tensors, tower)):
            shapes |= {f"{tower}.{layer}.{key}": shape for key, shape in _block(width, hidden).items()}
    return shapes


def _block(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (hidden, width),
        "mlp.c_fc.bias": (hidden,),
        "mlp.c_proj.weight": (width, hidden),
        "mlp.c_proj.bias": (width,),
    }


def _depth(tensors: dict[str, Tensor], tower: str) -> int:
    """The number of blocks of a tower; one that is missing among them shows as missing tensors."""
    return len({key[len(tower) + 1 :].split(".")[0] for key in tensors if key.startswith(f"{tower}.")})


def _size(tensors: dict[str, Tensor], key: str, axes: int, what: str) -> torch.Size:
    if key not in tensors or tensors[key].ndim != axes:
        found = f"is {list(tensors[key].shape)}" if key in tensors else "is missing"
        raise DataError(
            f"{key} of the weights of {what} {found}, so they are not those of an open_clip ViT.",
            "Fetch the file again from its publisher.",
        )
    return tensors[key].shape

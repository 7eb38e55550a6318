"""A random Mask2Former and a random CLIP in the layout of the published ones, for tests.

The Mask2Former tells COCO's 80 classes apart, mostly four of them, with peaked probabilities and varied masks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

QUERIES = 12
LIKELY = {11: "stop sign", 46: "banana", 47: "apple", 64: "computer mouse"}  # by index, in GenEval's spelling
SPARSE = 0.6  # by which masks are kept small
LETTERS = "abcdefghijklmnopqrstuvwxyz-"
# What the published file holds: a square size, and keys of an older version.
PROCESSOR = {
    "_max_size": 1333,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "ignore_index": 255,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "Mask2FormerImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "num_labels": 80,
    "reduce_labels": False,
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": 384, "width": 384},
    "size_divisor": 32,
}


@contextmanager
def without_scipy() -> Iterator[None]:
    """Lets transformers' own class be built: its loss asks for scipy then, and uses it only in training."""
    with mock.patch("transformers.models.mask2former.modeling_mask2former.requires_backends"):
        yield


def load_real(folder: Path) -> Mask2FormerForUniversalSegmentation:
    """What `save_detector` wrote, in transformers' own class."""
    with without_scipy():
        return Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()


def save_detector(folder: Path, seed: int = 0) -> Path:
    """The published layout: config.json, model.safetensors with the buffers of older versions, preprocessor_config.json."""
    torch.manual_seed(seed)
    swin = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=16, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=QUERIES,
        num_labels=80,
    )  # fmt: skip
    names = {index: f"class {index}" for index in range(80)}
    config.id2label = names | {0: "person", 11: "stop sign", 15: "cat", 79: "toothbrush"}
    with without_scipy():
        model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        model.class_predictor.weight.normal_(std=0.6)
        model.class_predictor.bias[list(LIKELY)] += 4
        projection = model.model.pixel_level_module.decoder.mask_projection
        projection.weight.normal_(std=0.5)
        projection.bias.fill_(-SPARSE)
        parameters = dict(model.named_parameters())
        parameters["model.transformer_module.decoder.mask_predictor.mask_embedder.2.0.bias"].fill_(SPARSE)
    model.save_pretrained(folder)
    tensors = {key: value.clone() for key, value in load_file(folder / "model.safetensors").items()}
    for key in ("weight", "bias"):  # the published file is older than this layer
        del tensors[f"model.pixel_level_module.encoder.swin.layernorm.{key}"]
    for key in [key for key in tensors if key.endswith("relative_position_bias_table")]:
        tensors[key.replace("bias_table", "index")] = torch.zeros(16, 16, dtype=torch.long)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def save_clip(folder: Path) -> Path:
    """32 px pictures, 77 tokens that are letters; large weights, so that unlike inputs have unlike features."""
    torch.manual_seed(1)
    tokens = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**shape, "vocab_size": len(tokens), "max_position_embeddings": 77, **ids},
        vision_config={**shape, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder

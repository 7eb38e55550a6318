"""Tiny random models of the Qwen-VL family in the layout they are published in, for tests.

Every component is the real class. Pictures have patches of 2 x 2 blocks, 4 px a patch for Qwen3-VL and 14 px for
Qwen2-VL, whose patch size the HPSv3 reward's area depends on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WORDS = ("Yes", "yes", "No", "one", "One", "two", "Two", "image", "red", "circle")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"  # Qwen2-VL's template puts it first


def tokenizer() -> Any:
    """All bytes, the words of `WORDS` with and without a space before them, and Qwen-VL's special tokens."""
    vocab = {character: index for index, character in enumerate(sorted(ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pairs = [(word[:end], word[end]) for end in range(1, len(word))]
        for pair in (*pairs, ("Ġ", word)):
            if pair not in merges:
                merges.append(pair)
                vocab.setdefault("".join(pair), len(vocab))
    made: Any = Qwen2Tokenizer(vocab=vocab, merges=merges)
    made.add_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return made


def save_inputs(folder: Path, preprocessor: dict[str, Any], template: str) -> Any:
    """Write tokenizer, chat template and preprocessor settings as published; returns the tokenizer."""
    made = tokenizer()
    made.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return made


def save_qwen3(folder: Path, seed: int = 0) -> Path:
    """A Qwen3-VL: 3 text layers of width 32, 2 vision layers, sides rounded to 8 px, area 16^2 to 48^2 px."""
    made = save_inputs(
        folder,
        {
            "size": {"longest_edge": 48 * 48, "shortest_edge": 16 * 16},
            "patch_size": 4,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "Qwen3VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessorFast",
        },
        TEMPLATE,
    )
    ids = dict(zip(SPECIAL, made.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(made),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = Qwen3VLForConditionalGeneration(config)
        spread(model)
        model.save_pretrained(folder)
    return folder


QWEN2_PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}


def save_hpsv3(folder: Path, seed: int = 0) -> Path:
    """HPSv3.safetensors and the files of Qwen2-VL it needs, with the published names and layouts; width 32.

    The vocabulary of config.json is larger than the tokenizer's, as the published one is.
    """
    made = save_inputs(folder, QWEN2_PREPROCESSOR, SYSTEM + TEMPLATE)
    ids = dict(zip(SPECIAL, made.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "in_chans": 3,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "vocab_size": len(made) + 40,
    }
    (folder / "config.json").write_text(json.dumps(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tensors = _hpsv3_tensors(folder, len(made) + 1)
    save_file(tensors, folder / "HPSv3.safetensors")
    return folder


def _hpsv3_tensors(folder: Path, vocabulary: int) -> dict[str, Tensor]:
    config: Any = Qwen2VLConfig.from_pretrained(folder)
    config.text_config.vocab_size = vocabulary
    model: Any = Qwen2VLForConditionalGeneration(config).float()
    spread(model)
    tensors = {
        key.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value.contiguous()
        for key, value in model.state_dict().items()
    }
    for place, rows, columns in ((0, 1024, 32), (3, 16, 1024), (5, 2, 16)):
        tensors[f"rm_head.{place}.weight"] = torch.randn(rows, columns) * columns**-0.5 * 1.4
        tensors[f"rm_head.{place}.bias"] = torch.randn(rows) * 0.1
    return tensors


def spread(model: torch.nn.Module) -> None:
    """Random matrices that keep the size of what they act on: with the usual small ones nothing would show."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            scale = {"embed_tokens": 1.0, "lm_head": 0.3}.get(
                name.split(".")[-2], parameter[0].numel() ** -0.5
            )
            parameter.data.normal_(0, scale)
        else:
            parameter.data += 0.2 * torch.randn_like(parameter)


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """A smooth random picture [3,H,W] of 8-bit values in 0..1, as a file would hold."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (smooth[0] * 255).round() / 255


def as_pil(image: Tensor) -> Image.Image:
    """[3,H,W] of 8-bit values in 0..1 -> the same as PIL's."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).contiguous().numpy())

"""A tiny random CLIP in transformers' layout, and 8-bit pictures for it."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIZE = 32  # px, what the tiny model takes
LENGTH = 12  # text tokens
PROMPTS = ["a red circle", "blue ring", "red ring left of a circle and many more words than fit", ""]


def tokenizer() -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        "re",
        "red</w>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, model_max_length=LENGTH, merges=[("r", "e"), ("re", "d</w>")])  # type: ignore[list-item]


def processor(**changes: Any) -> CLIPImageProcessorPil:
    """Unlike settings for size and crop, so that a mix-up shows."""
    size = {"size": {"shortest_edge": SIZE + 4}, "crop_size": {"height": SIZE, "width": SIZE}}
    return CLIPImageProcessorPil(**{**size, **changes})


def save_clip(folder: Path, projection: int = 24, **text: Any) -> Path:
    """A random CLIP with large weights, so that unlike inputs have clearly unlike features."""
    torch.manual_seed(0)
    tok = tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {
        name: tok.convert_tokens_to_ids(tok.special_tokens_map[name[:-3]])
        for name in ("bos_token_id", "eos_token_id")
    }
    config = CLIPConfig(
        text_config={**shape, "vocab_size": len(tok), "max_position_embeddings": LENGTH, **ids, **text},
        vision_config={**shape, "image_size": SIZE, "patch_size": 8},
        projection_dim=projection,
    )
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def pictures(count: int, height: int, width: int) -> Tensor:
    """8-bit pictures [count,3,height,width] in 0..1 with sharp edges and noise."""
    rng = torch.Generator().manual_seed(height + width)
    images = torch.rand(count, 3, 1, 1, generator=rng).repeat(1, 1, height, width)
    images[:, :, height // 4 : height // 2, width // 3 :] = torch.tensor([1.0, 0.0, 1.0])[:, None, None]
    images[:, :, height // 2 :, :] = torch.rand(count, 3, height - height // 2, width, generator=rng)
    return (images * 255).round() / 255


def as_pil(images: Tensor) -> list[Image.Image]:
    arrays = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]

"""Tiny random Z-Image and Qwen-Image pipelines in the exact layout of diffusers; prompts are encoded by models of Qwen's."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
)

from tests.tiny_models import vae

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
QWEN_WIDTH = 16


def build_zimage_pipeline(seed: int = 0) -> Any:
    """Z-Image with random weights drawn from `seed`, the learnt padding tokens too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = qwen_tokenizer()
        pipe: Any = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=6.0),
            vae=vae(),
            text_encoder=Qwen3Model(qwen3_config(len(tokenizer), 3)),
            tokenizer=tokenizer,
            transformer=ZImageTransformer2DModel(
                in_channels=4,
                dim=32,
                n_layers=2,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=QWEN_WIDTH,
                axes_dims=[4, 6, 6],
                axes_lens=[128, 32, 32],
            ),
        )
        for token in (pipe.transformer.x_pad_token, pipe.transformer.cap_pad_token):
            torch.nn.init.normal_(token)
        return pipe


TEMPLATE_WORDS = (
    *("system", "user", "assistant", "Describe"),
    *(
        f" {word}"
        for word in ["the", "image", "by", "detailing", "color", "shape", "size", "texture", "quantity"]
    ),
    *(f" {word}" for word in ["text", "spatial", "relationships", "of", "objects", "and", "background"]),
)
"""Each is one token, as in the real vocabulary: the pipeline cuts its template's 34 tokens off by their number."""


def build_qwenimage_pipeline(seed: int = 0) -> Any:
    """Qwen-Image with random weights drawn from `seed`, and its hub's scheduler at smaller sizes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = template_tokenizer(1200)
        text = {
            "vocab_size": len(tokenizer),
            "hidden_size": QWEN_WIDTH,
            "intermediate_size": 2 * QWEN_WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 1200,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        }
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision | {"out_hidden_size": QWEN_WIDTH})
        pipe = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                num_train_timesteps=1000,
                shift=1.0,
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=0.9,
                base_image_seq_len=8,
                max_image_seq_len=64,
                shift_terminal=0.02,
            ),
            vae=AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 1, 1],
                num_res_blocks=1,
                temperal_downsample=[False, True],
                latents_mean=[-0.7, 0.1, 0.9, -0.2],
                latents_std=[2.8, 1.4, 0.7, 2.0],
            ),
            text_encoder=Qwen2_5_VLForConditionalGeneration(config),
            tokenizer=tokenizer,
            transformer=QwenImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=QWEN_WIDTH,
                axes_dims_rope=(4, 6, 6),
            ),
        )
        pipe.transformer.register_to_config(pooled_projection_dim=768)  # published, and read by nothing
        return pipe


def qwen3_config(words: int, layers: int) -> Qwen3Config:
    """Of a text encoder with so many words and layers."""
    return Qwen3Config(
        vocab_size=words,
        hidden_size=QWEN_WIDTH,
        intermediate_size=2 * QWEN_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
    )


def template_tokenizer(length: int) -> Any:
    """`qwen_tokenizer` with the words of Qwen-Image's template."""
    made = qwen_tokenizer(length)
    made.add_tokens([AddedToken(word, normalized=False) for word in TEMPLATE_WORDS])
    return made


def qwen_tokenizer(length: int = 64) -> Any:
    """All bytes, and the special tokens of Qwen3's chat template; prompts of `length` tokens."""
    vocab = {character: index for index, character in enumerate(sorted(ByteLevel.alphabet()))}
    made: Any = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=length)
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    made.add_tokens([AddedToken(token, special=True) for token in special])
    made.chat_template = CHAT
    return made

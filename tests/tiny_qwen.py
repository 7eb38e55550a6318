"""Tiny random pipelines whose prompts a language model of Qwen's encodes: Z-Image, in the exact layout of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

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
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=QWEN_WIDTH,
            intermediate_size=2 * QWEN_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=64,
        )
        pipe: Any = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=6.0),
            vae=vae(),
            text_encoder=Qwen3Model(config),
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


def qwen_tokenizer(length: int = 64) -> Any:
    """All bytes, and the special tokens of Qwen3's chat template; prompts of `length` tokens."""
    vocab = {character: index for index, character in enumerate(sorted(ByteLevel.alphabet()))}
    made: Any = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=length)
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    made.add_tokens([AddedToken(token, special=True) for token in special])
    made.chat_template = CHAT
    return made

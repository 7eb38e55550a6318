"""A tiny random Stable Diffusion 3 pipeline in the exact layout of diffusers, for tests.

Pictures are 32 x 32 px, latents [4, 8, 8] (4x compression), 16 image tokens, 12 CLIP + 8 T5 text tokens.
The weights are random; every component is the real class, saved with the pipeline's `save_pretrained`;
the scheduler's file has the published keys alone.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from rtdmd_cli.config.schema import ModelConfig
from rtdmd_cli.engine.backbones.sd3 import SD3Backbone, load
from tests.published import cut_scheduler

RESOLUTION = 32  # px
CLIP_LENGTH = 12  # tokens
TEXT_LENGTH = 8  # T5 tokens
CLIP_WIDTH = 16
T5_WIDTH = 40  # at least the sum of the CLIP widths
PROMPTS = ["a red circle", "a photo of two blue rings", "a green cross left of a red star", "a ring"]

_WORDS = ("red", "blue", "green", "circle", "ring", "cross", "star", "photo", "left", "two")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def clip_tokenizer(length: int = CLIP_LENGTH) -> CLIPTokenizer:
    """A byte-level alphabet of letters and the merges that make up `_WORDS`; prompts of `length` tokens."""
    tokens = [*_LETTERS, *(letter + "</w>" for letter in _LETTERS)]
    merges: list[Any] = []
    for word in _WORDS:
        left = word[0]
        for i, letter in enumerate(word[1:], start=2):
            right = letter + ("</w>" if i == len(word) else "")
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + word, -2.0) for word in _WORDS]
    pieces += [("▁", -3.0)] + [(letter, -4.0) for letter in _LETTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def _clip_encoder(tokenizer: CLIPTokenizer, projection: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_kv=10,
        d_ff=2 * T5_WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.1,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config)


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=RESOLUTION,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _transformer(dual_attention_layers: tuple[int, ...] = (), layers: int = 3) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=8 + 12,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=dual_attention_layers,
    )


def build_transformer(seed: int = 0, dual_attention_layers: tuple[int, ...] = ()) -> Any:
    """The pipeline's transformer alone, in eval mode; some of its 3 layers with SD3.5's second attention."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer: Any = _transformer(dual_attention_layers)
        return transformer.eval()


def build_sd3_pipeline(
    seed: int = 0, shift: float = 3.0, dual_attention_layers: tuple[int, ...] = (), layers: int = 3
) -> StableDiffusion3Pipeline:
    """The pipeline with random weights drawn from `seed`; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip, clip_2, t5 = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
        return StableDiffusion3Pipeline(
            transformer=_transformer(dual_attention_layers, layers),
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift),
            vae=vae(),
            text_encoder=_clip_encoder(clip, 8),
            tokenizer=clip,
            text_encoder_2=_clip_encoder(clip_2, 12),
            tokenizer_2=clip_2,
            text_encoder_3=t5_encoder(t5),
            tokenizer_3=t5,
        )


def save_sd3(folder: Path, seed: int = 0, shift: float = 3.0, layers: int = 3) -> Path:
    """Build and save a tiny pipeline into `folder` (safetensors); returns `folder`. layers: of the transformer."""
    pipe: Any = build_sd3_pipeline(seed, shift, layers=layers)
    pipe.save_pretrained(folder, safe_serialization=True)
    cut_scheduler(folder)
    return folder


@functools.cache
def sd3_folder() -> Path:
    """One saved tiny pipeline per test process, not to be written to; removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-sd3-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return save_sd3(folder)


def sd3_config(path: Path | str | None = None, guidance: float = 4.0) -> ModelConfig:
    """A preset's model section for the tiny pipeline (`sd3_folder()` where no path is given)."""
    return ModelConfig(
        family="sd3",
        path=str(path or sd3_folder()),
        revision=None,
        resolution=RESOLUTION,
        text_length=TEXT_LENGTH,
        guidance=guidance,
        teacher_steps=6,
    )


def load_sd3(dtype: torch.dtype = torch.float32) -> SD3Backbone:
    """A fresh backbone on the tiny pipeline, on the CPU."""
    return load(sd3_config(), torch.device("cpu"), dtype)

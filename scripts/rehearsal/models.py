"""What is rehearsed: pipelines of the published shapes, component by component, and the presets they go with.

The shapes are those of the configuration files in the models' repositories; `tests/scripts/test_rehearse.py` counts their
parameters. Tokenizers have small vocabularies of their own, with the published lengths: what a prompt says is of no matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from rtdmd_cli.engine.planning.configs import published
from scripts.gpu.models import FLUX1_DEV, KLEIN_4B, SD3_M, SD35_M
from tests import tiny_clip
from tests.tiny_flux import qwen_tokenizer
from tests.tiny_models import clip_tokenizer, t5_tokenizer
from tests.tiny_qwen import template_tokenizer

CLIP_TOKENS = 77
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
ZIMAGE, QWEN_IMAGE = (published()[name] for name in ("Tongyi-MAI/Z-Image", "Qwen/Qwen-Image"))
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SD3_VAE = VAE | {"scaling_factor": 1.5305, "shift_factor": 0.0609}
FLUX1_VAE = VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159}


@dataclass(frozen=True)
class Network:
    """A network: how it is built (without memory for its weights), and names that repeat another's weights."""

    build: Callable[[], Any]
    tied: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rehearsal:
    """A model, the preset it is rehearsed with, and what of the preset is changed.

    networks: of the pipeline; tokenizers; second_base: a folder with another transformer, the generator's own.
    index: further entries of model_index.json. scheduler: its settings. sizes: sides of the training pictures, pixels.
    """

    preset: str
    family: str
    networks: Mapping[str, Network] = field(repr=False)
    tokenizers: Mapping[str, Callable[[], Any]] = field(repr=False)
    pickscore: Network = field(repr=False)
    sizes: tuple[int, ...] = (256,)
    second_base: bool = False
    index: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(
        default_factory=lambda: {"shift": 3.0, "use_dynamic_shifting": True}, repr=False
    )
    changes: tuple[str, ...] = ()


def clip_text(
    kind: type[Any], shape: Mapping[str, Any], projection: int, activation: str, vocabulary: int = 49408
) -> Any:
    """A CLIP text encoder for the small tokenizer; its ids of begin, end and padding are that tokenizer's."""
    return kind(
        CLIPTextConfig(
            **shape,
            **_special(),
            vocab_size=vocabulary,
            projection_dim=projection,
            max_position_embeddings=CLIP_TOKENS,
            hidden_act=activation,
        )
    )


def _special() -> dict[str, Any]:
    tokenizer = clip_tokenizer(CLIP_TOKENS)
    ids = {name: tokenizer.convert_tokens_to_ids(tokenizer.special_tokens_map[name]) for name in SPECIAL}
    return {f"{name.removesuffix('_token')}_token_id": value for name, value in ids.items()}


SPECIAL = ("bos_token", "eos_token", "pad_token")


def t5(**shape: Any) -> Any:
    """T5's encoder, version 1.1."""
    return T5EncoderModel(T5Config(**shape, feed_forward_proj="gated-gelu", is_encoder_decoder=False))


def qwen(kind: type[Any], **shape: Any) -> Any:
    """Qwen3, whose output layer, where it has one, is its embedding."""
    return kind(Qwen3Config(**shape, tie_word_embeddings=True, max_position_embeddings=40960))


def qwen_vl(**shape: Any) -> Any:
    """Qwen2.5-VL."""
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**shape))


def pickscore(text: Mapping[str, int], vision: Mapping[str, int], projection: int, vocabulary: int) -> Any:
    """A CLIP in transformers' layout for the tokenizer of `tests.tiny_clip`."""
    tokenizer = tiny_clip.tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    words = {**text, **ids, "vocab_size": vocabulary, "hidden_act": "gelu"}
    config = CLIPConfig(
        text_config=words, vision_config={**vision, "hidden_act": "gelu"}, projection_dim=projection
    )
    return CLIPModel(config)


CLIP_H = Network(
    partial(
        pickscore,
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "max_position_embeddings": CLIP_TOKENS,
        },
        {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
        },
        1024,
        49408,
    )
)
T5 = Network(partial(t5, **T5_XXL), tied=("encoder.embed_tokens.weight",))
SD3_ENCODERS = {
    "text_encoder": Network(partial(clip_text, CLIPTextModelWithProjection, CLIP_L, 768, "quick_gelu")),
    "text_encoder_2": Network(partial(clip_text, CLIPTextModelWithProjection, CLIP_G, 1280, "gelu")),
    "text_encoder_3": T5,
}
SD3_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "tokenizer": partial(clip_tokenizer, CLIP_TOKENS),
    "tokenizer_2": partial(clip_tokenizer, CLIP_TOKENS),
    "tokenizer_3": t5_tokenizer,
}


SD3_TIMES = {"shift": 3.0, "use_dynamic_shifting": False}


def _sd3(preset: str, shape: Mapping[str, Any], sizes: tuple[int, ...]) -> Rehearsal:
    networks = {
        "transformer": Network(partial(SD3Transformer2DModel, **shape)),
        "vae": Network(partial(AutoencoderKL, **SD3_VAE)),
        **SD3_ENCODERS,
    }
    return Rehearsal(preset, "sd3", networks, SD3_TOKENIZERS, CLIP_H, sizes, scheduler=SD3_TIMES)


SMALL_VAE = VAE | {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 8),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}
SMALL_CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_SD3 = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 40,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 8,
}
SMALL = Rehearsal(
    "sd3-4step-24gb",
    "sd3",
    {
        "transformer": Network(partial(SD3Transformer2DModel, **SMALL_SD3)),
        "vae": Network(partial(AutoencoderKL, **SMALL_VAE)),
        "text_encoder": Network(
            partial(clip_text, CLIPTextModelWithProjection, SMALL_CLIP, 8, "quick_gelu", 100)
        ),
        "text_encoder_2": Network(
            partial(clip_text, CLIPTextModelWithProjection, SMALL_CLIP, 12, "gelu", 100)
        ),
        "text_encoder_3": Network(
            partial(t5, d_model=40, d_kv=10, d_ff=80, num_layers=2, num_heads=4, vocab_size=100),
            tied=("encoder.embed_tokens.weight",),
        ),
    },
    SD3_TOKENIZERS,
    Network(
        partial(
            pickscore,
            {**SMALL_CLIP, "max_position_embeddings": CLIP_TOKENS},
            {**SMALL_CLIP, "image_size": 32, "patch_size": 8},
            24,
            100,
        )
    ),
    sizes=(32,),
    scheduler=SD3_TIMES,
)
SHORT_PROMPTS = ("model.text_length=128",)
"""Of 512: half the tokens, and so half the hours on a CPU."""
REHEARSALS = {
    "small": SMALL,
    "sd3": _sd3("sd3-4step-24gb", SD3_M, (256, 512)),
    "sd35": _sd3("sd35-4step-24gb", SD35_M, (256,)),
    "flux2-klein-4b": Rehearsal(
        "flux2-klein-4b-4step-24gb",
        "flux2",
        {
            "transformer": Network(partial(Flux2Transformer2DModel, **KLEIN_4B)),
            "vae": Network(AutoencoderKLFlux2),
            "text_encoder": Network(partial(qwen, Qwen3ForCausalLM, **QWEN3_4B), tied=("lm_head.weight",)),
        },
        {"tokenizer": partial(qwen_tokenizer, 512)},
        CLIP_H,
        second_base=True,
        index={"is_distilled": False},
        changes=SHORT_PROMPTS,
    ),
    "flux1": Rehearsal(
        "flux1-4step-24gb",
        "flux1",
        {
            "transformer": Network(partial(FluxTransformer2DModel, **FLUX1_DEV)),
            "vae": Network(partial(AutoencoderKL, **FLUX1_VAE)),
            "text_encoder": Network(partial(clip_text, CLIPTextModel, CLIP_L, 768, "quick_gelu")),
            "text_encoder_2": T5,
        },
        {"tokenizer": partial(clip_tokenizer, CLIP_TOKENS), "tokenizer_2": t5_tokenizer},
        CLIP_H,
        changes=SHORT_PROMPTS,
    ),
    "zimage": Rehearsal(
        "zimage-4step-24gb",
        "zimage",
        {
            "transformer": Network(partial(ZImageTransformer2DModel, **ZIMAGE["transformer"])),
            "vae": Network(partial(AutoencoderKL, **FLUX1_VAE)),
            "text_encoder": Network(partial(qwen, Qwen3Model, **QWEN3_4B)),
        },
        {"tokenizer": partial(qwen_tokenizer, 512)},
        CLIP_H,
        scheduler=ZIMAGE["scheduler"],
        changes=SHORT_PROMPTS,
    ),
    "qwenimage": Rehearsal(
        "qwenimage-4step-24gb",
        "qwenimage",
        {
            "transformer": Network(partial(QwenImageTransformer2DModel, **QWEN_IMAGE["transformer"])),
            "vae": Network(partial(AutoencoderKLQwenImage)),
            "text_encoder": Network(partial(qwen_vl, **QWEN_IMAGE["text_encoder"])),
        },
        {"tokenizer": partial(template_tokenizer, 1024)},
        CLIP_H,
        scheduler=QWEN_IMAGE["scheduler"],
        changes=SHORT_PROMPTS,
    ),
}
"""By the name that scripts/rehearse takes."""

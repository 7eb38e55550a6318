"""Tiny random FLUX.1 and FLUX.2-klein pipelines in the exact layout of diffusers, and one table of all families.

As `tiny_models`: pictures of 32 x 32 px, 4x compression, 16 image tokens; every component is the real class.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, Qwen3ForCausalLM

from rtdmd_cli.config.schema import ModelConfig
from rtdmd_cli.engine.backbones.base import Backbone
from rtdmd_cli.engine.backbones.families import load_backbone
from tests.published import cut_scheduler
from tests.tiny_models import (
    CLIP_LENGTH,
    CLIP_WIDTH,
    RESOLUTION,
    T5_WIDTH,
    build_sd3_pipeline,
    clip_tokenizer,
    t5_encoder,
    t5_tokenizer,
    vae,
)
from tests.tiny_qwen import (
    QWEN_WIDTH,
    build_qwenimage_pipeline,
    build_zimage_pipeline,
    qwen3_config,
    qwen_tokenizer,
)

FP8 = torch.float8_e4m3fn
QWEN_LAYERS = 28  # the pipeline reads the hidden states 9, 18 and 27


def build_flux1_pipeline(seed: int = 0, guidance_embeds: bool = True) -> Any:
    """FLUX.1 with random weights drawn from `seed`; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip, t5 = clip_tokenizer(), t5_tokenizer()
        config = CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=CLIP_WIDTH,
            intermediate_size=2 * CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,
            pad_token_id=clip.pad_token_id,
        )
        return FluxPipeline(
            scheduler=_scheduler(),
            vae=vae(),
            text_encoder=CLIPTextModel(config),
            tokenizer=clip,
            text_encoder_2=t5_encoder(t5),
            tokenizer_2=t5,
            transformer=FluxTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=T5_WIDTH,
                pooled_projection_dim=CLIP_WIDTH,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(4, 6, 6),
            ),
        )


def build_flux2_pipeline(seed: int = 0, is_distilled: bool = False) -> Any:
    """FLUX.2-klein with random weights and random statistics of the VAE's batch norm, drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = qwen_tokenizer()
        pipe: Any = Flux2KleinPipeline(
            scheduler=_scheduler(),
            vae=_flux2_vae(),
            text_encoder=Qwen3ForCausalLM(qwen3_config(len(tokenizer), QWEN_LAYERS)),
            tokenizer=tokenizer,
            transformer=Flux2Transformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=3 * QWEN_WIDTH,
                guidance_embeds=False,
                axes_dims_rope=(4, 4, 4, 4),
                timestep_guidance_channels=16,
            ),
            is_distilled=is_distilled,
        )
        pipe.vae.bn.running_mean.normal_(std=0.5)
        pipe.vae.bn.running_var.uniform_(0.5, 2.0)
        return pipe


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    """As FLUX.1-dev's and FLUX.2-klein's: shifted by the number of tokens."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=8,  # not the defaults, so that the file's values show
        max_image_seq_len=64,
    )


def _flux2_vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=RESOLUTION,
    )


def _unchanged(pipe: Any, x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Tiny:
    """A family's small model: how it is built, and what a preset says of it. shape: of its latents.

    blocks: lists of the transformer that hold adapted layers. idle: adapted layers that reach no picture. shifts: whether the
    schedule follows the size. few: changes of the scheduler's configuration for the few-step schedule. Of the stock
    pipeline: `encoded(pipe, prompts, length)`, each prompt's own rows and its pooled part; `call(guidance)`, the arguments
    that mean this guidance here; `given`, our latents for its `latents=`; `returned`, ours as it gives them out at the end.
    """

    family: str
    build: Callable[[], Any]
    guidance: float
    shape: tuple[int, int, int]
    text_length: int
    targets: str  # of its adapters, in a preset
    encoded: Callable[[Any, list[str], int], list[tuple[Tensor, Tensor | None]]]
    call: Callable[[float], dict[str, Any]] = lambda guidance: {"guidance_scale": guidance}
    given: Callable[[Any, Tensor], Tensor] = _unchanged
    returned: Callable[[Any, Tensor], Tensor] = _unchanged
    blocks: tuple[str, ...] = ("transformer_blocks",)
    shifts: bool = True
    few: Mapping[str, Any] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()


def _sd3_encoded(pipe: Any, prompts: list[str], length: int) -> list[tuple[Tensor, Tensor | None]]:
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, max_sequence_length=length)
    return list(zip(embeds, pooled, strict=True))


def _flux1_encoded(pipe: Any, prompts: list[str], length: int) -> list[tuple[Tensor, Tensor | None]]:
    embeds, pooled, _ = pipe.encode_prompt(prompts, None, max_sequence_length=length)
    return list(zip(embeds, pooled, strict=True))


def _first_encoded(pipe: Any, prompts: list[str], length: int) -> list[tuple[Tensor, Tensor | None]]:
    """FLUX.2 and Z-Image."""
    embeds = pipe.encode_prompt(list(prompts), max_sequence_length=length)[0]
    return [(each, None) for each in embeds]


def _qwenimage_encoded(pipe: Any, prompts: list[str], length: int) -> list[tuple[Tensor, Tensor | None]]:
    embeds, mask = pipe.encode_prompt(prompts, max_sequence_length=length)
    return [(each[own.bool()], None) for each, own in zip(embeds, mask, strict=True)]


def _packed(pipe: Any, x: Tensor) -> Tensor:
    packed: Tensor = pipe._pack_latents(x, *x.shape)
    return packed


def _flux2_returned(pipe: Any, x: Tensor) -> Tensor:
    """The VAE's own latents."""
    bn = pipe.vae.bn
    std = (bn.running_var + pipe.vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    unpacked: Tensor = pipe._unpatchify_latents(x * std + bn.running_mean.view(1, -1, 1, 1))
    return unpacked


ATTENTION = "to_q, to_k, to_v, to_out.0, add_q_proj, add_k_proj, add_v_proj, to_add_out"
FLUX_BLOCKS = ("transformer_blocks", "single_transformer_blocks")
_SD3 = Tiny("sd3", build_sd3_pipeline, 4.0, (4, 8, 8), 8, ATTENTION, encoded=_sd3_encoded, shifts=False)
TINY: dict[str, Tiny] = {
    "sd3": _SD3,
    "sd35": replace(
        _SD3, build=functools.partial(build_sd3_pipeline, dual_attention_layers=(0, 1)), guidance=4.5
    ),
    "flux1": Tiny(
        "flux1",
        build_flux1_pipeline,
        3.5,
        (4, 8, 8),
        8,
        ATTENTION,
        encoded=_flux1_encoded,
        given=_packed,
        returned=_packed,
        blocks=FLUX_BLOCKS,
    ),
    "flux2": Tiny(
        "flux2",
        build_flux2_pipeline,
        4.0,
        (16, 4, 4),
        48,
        f"{ATTENTION}, to_qkv_mlp_proj, to_out",
        encoded=_first_encoded,
        returned=_flux2_returned,
        blocks=FLUX_BLOCKS,
    ),
    "zimage": Tiny(
        "zimage",
        build_zimage_pipeline,
        5.0,
        (4, 8, 8),
        48,
        "to_q, to_k, to_v, to_out.0",
        encoded=_first_encoded,
        call=lambda guidance: {"guidance_scale": guidance - 1},  # its scale counts from 0
        blocks=("layers", "noise_refiner", "context_refiner"),
        shifts=False,
    ),
    "qwenimage": Tiny(
        "qwenimage",
        build_qwenimage_pipeline,
        4.0,
        (4, 8, 8),
        48,
        ATTENTION,
        encoded=_qwenimage_encoded,
        call=lambda guidance: (
            {"true_cfg_scale": guidance} | ({"negative_prompt": ["", ""]} if guidance > 1 else {})
        ),
        given=_packed,
        returned=_packed,
        few={"shift_terminal": None},
        idle=frozenset(
            f"transformer_blocks.1.attn.{end}" for end in ("add_q_proj", "to_add_out")
        ),  # the last text
    ),
}
FAMILIES = tuple(name for name in TINY if name != "sd3")
"""One small model a family; the built-in one's own tests are `test_sd3`."""


@functools.cache
def tiny_folder(name: str) -> Path:
    """One saved pipeline per name and test process, not to be written to; removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"tiny-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    save(TINY[name].build(), folder)
    return folder


def save(pipe: Any, folder: Path) -> Path:
    """Save a pipeline as the hub holds it; returns `folder`."""
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipe.save_pretrained(folder, safe_serialization=True)
    cut_scheduler(folder)
    return folder


def tiny_config(name: str, **changes: Any) -> ModelConfig:
    """A preset's model section for a small model."""
    tiny = TINY[name]
    values: dict[str, Any] = {
        "family": tiny.family,
        "path": str(changes.pop("path", None) or tiny_folder(name)),
        "resolution": RESOLUTION,
        "text_length": tiny.text_length,
        "guidance": tiny.guidance,
        "teacher_steps": 6,
    }
    return ModelConfig(**(values | changes))


def load_tiny(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Backbone:
    """A fresh backbone on a small model, on the CPU."""
    return load_backbone(tiny_config(name, **changes), torch.device("cpu"), dtype)


def in_fp8(tensors: dict[str, Tensor], scale: str, rows: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Layers' weights in 8 bits with their scales beside them, and the weights that this means."""
    stored, meant = {"scaled_fp8": torch.zeros(2, dtype=FP8)}, {}
    for name, tensor in tensors.items():
        layer, _, end = name.rpartition(".")
        stored[name] = meant[name] = tensor
        if end == "weight" and tensor.ndim == 2:
            factor = tensor.abs().amax(1) / 448 if rows else tensor.abs().max().reshape(1) / 448
            column = factor.reshape(-1, 1)
            stored[name] = (tensor / column).to(FP8)
            stored[f"{layer}.{scale}"] = factor.contiguous()
            stored[f"{layer}.input_scale"] = torch.ones(1)
            meant[name] = stored[name].float() * column
    return stored, meant

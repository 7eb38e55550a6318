"""Stable Diffusion 3 and 3.5 Medium on diffusers' own pipeline.

Prompt encoding, latent scaling and the scheduler's shift are the pipeline's; none is written again here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from rtdmd_cli.config.schema import HardwareConfig, ModelConfig
from rtdmd_cli.engine.backbones.base import PLAIN, Conditioning
from rtdmd_cli.engine.backbones.common import (
    PipelineBackbone,
    check_size,
    require_unguided,
    schedule,
)
from rtdmd_cli.engine.backbones.layout import Layout
from rtdmd_cli.engine.backbones.loading import load_pipeline
from rtdmd_cli.errors import DataError

LAYOUT = Layout(
    StableDiffusion3Pipeline,
    {
        "transformer": SD3Transformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    },
    ("tokenizer", "tokenizer_2", "tokenizer_3"),
    optional=("text_encoder_3", "tokenizer_3"),  # the stock pipeline runs without T5
    pooled=True,
    clip_first=True,
)
ENCODE_BATCH = 64  # prompts at once


class SD3Backbone(PipelineBackbone):
    """See `base.Backbone`. Made by `load`."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        scale, config = self._pipe.vae_scale_factor, self._pipe.transformer.config
        multiple = scale * self._pipe.patch_size
        check_size(height, width, multiple, multiple * config.pos_embed_max_size)
        return config.in_channels, height // scale, width // scale

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        def part(texts: list[str]) -> Conditioning:
            embeds, _, pooled, _ = self._pipe.encode_prompt(
                prompt=texts,
                prompt_2=None,
                prompt_3=None,
                device=self.encoder_device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.text_length,
            )
            return Conditioning(embeds, pooled)

        return self.encode_in_parts(prompts, ENCODE_BATCH, part)

    def velocity(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float | Tensor = 1.0
    ) -> Tensor:
        assert sigma.shape == x.shape[:1], f"sigma {tuple(sigma.shape)} for x {tuple(x.shape)}"
        assert cond.pooled is not None
        require_unguided(guidance)
        v: Tensor = self.transformer(
            hidden_states=x.to(self.dtype),
            timestep=sigma.float() * self._pipe.scheduler.config.num_train_timesteps,
            encoder_hidden_states=cond.embeds.to(self.dtype),
            pooled_projections=cond.pooled.to(self.dtype),
            return_dict=False,
        )[0]
        return v.float()

    def sigmas(self, raw_steps: Sequence[float], shape: Sequence[int]) -> Tensor:
        return schedule(self._pipe.scheduler, sigmas=list(raw_steps))

    def stock_sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        return schedule(self._pipe.scheduler, num_inference_steps=steps)


BACKBONE = SD3Backbone
"""The family's backbone."""


def load(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, hardware: HardwareConfig = PLAIN
) -> SD3Backbone:
    """Load the model that `config` names. Errors as `loading.load_pipeline`."""
    loaded = load_pipeline(LAYOUT, config, device, dtype, hardware)
    if loaded.pipe.scheduler.config.use_dynamic_shifting:
        raise DataError(
            f"The scheduler in {loaded.sources.folder} shifts by resolution, which no SD3 model does.",
            LAYOUT.renew,
        )
    return SD3Backbone(LAYOUT, loaded, device, dtype)

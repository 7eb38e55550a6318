"""FLUX.1-dev on diffusers' own pipeline.

Prompt encoding, packing, position ids, latent scaling and the scheduler's shift (`mu`) are the pipeline's; none is
written again here. The guidance scale is an input of the network, so guidance costs no second evaluation. Latents
are the VAE's, [B, 16, H/8, W/8], and are packed 2 x 2 for the network alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

from rtdmd_cli.config.schema import HardwareConfig, ModelConfig
from rtdmd_cli.engine.backbones.base import PLAIN, Conditioning
from rtdmd_cli.engine.backbones.common import (
    PipelineBackbone,
    check_size,
    evenly_spaced,
    linear_mu,
    require_unguided,
    schedule,
)
from rtdmd_cli.engine.backbones.layout import Layout
from rtdmd_cli.engine.backbones.loading import Loaded, load_pipeline

LAYOUT = Layout(
    FluxPipeline,
    {
        "transformer": FluxTransformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": T5EncoderModel,
    },
    ("tokenizer", "tokenizer_2"),
    pooled=True,
)
ENCODE_BATCH = 16  # prompts at once
PACK = 2  # latent pixels of a token's side
LARGEST = 4096  # px


class Flux1Backbone(PipelineBackbone):
    """See `base.Backbone`. Made by `load`."""

    def __init__(self, layout: Layout, loaded: Loaded, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(layout, loaded, device, dtype)
        self.embedded_guidance = bool(loaded.pipe.transformer.config.guidance_embeds)

    def remark(self, guidance: float) -> str:
        if guidance == 1 or self.embedded_guidance:
            return ""
        return (
            f"; it has no input for guidance (FLUX.1-schnell has none either): model.guidance {guidance:g} is classifier-free "
            "here, two evaluations a step; for a base that was distilled to few steps set it to 1"
        )

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        scale = self._pipe.vae_scale_factor
        check_size(height, width, PACK * scale, LARGEST)
        return self._pipe.transformer.config.in_channels // PACK**2, height // scale, width // scale

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        def part(texts: list[str]) -> Conditioning:
            embeds, pooled, _ = self._pipe.encode_prompt(
                prompt=texts, prompt_2=None, device=self.encoder_device, max_sequence_length=self.text_length
            )
            return Conditioning(embeds, pooled)

        return self.encode_in_parts(prompts, ENCODE_BATCH, part)

    def velocity(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float | Tensor = 1.0
    ) -> Tensor:
        assert sigma.shape == x.shape[:1], f"sigma {tuple(sigma.shape)} for x {tuple(x.shape)}"
        assert cond.pooled is not None
        pipe, (count, channels, height, width) = self._pipe, x.shape
        embeds, pooled = cond.embeds.to(self.dtype), cond.pooled.to(self.dtype)

        def text_ids() -> Tensor:
            ids: Tensor = pipe.encode_prompt(
                prompt=None, prompt_embeds=embeds, pooled_prompt_embeds=pooled, device=x.device
            )[2]
            return ids

        def image_ids() -> Tensor:
            ids: Tensor = pipe._prepare_latent_image_ids(
                count, height // PACK, width // PACK, x.device, torch.float32
            )
            return ids

        v: Tensor = self.transformer(
            hidden_states=pipe._pack_latents(x.to(self.dtype), count, channels, height, width),
            timestep=sigma.float(),
            guidance=self._guidance(guidance, sigma),
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=self.kept("text", (embeds.shape[1], 0, 0), text_ids),
            img_ids=self.kept("image", (height, width, 0), image_ids),
            return_dict=False,
        )[0]
        scale = pipe.vae_scale_factor
        unpacked: Tensor = pipe._unpack_latents(v, height * scale, width * scale, scale)
        return unpacked.float()

    def _guidance(self, guidance: float | Tensor, sigma: Tensor) -> Tensor | None:
        """[B] float32; None for a network without that input."""
        if not self.embedded_guidance:
            require_unguided(guidance)
            return None
        if not isinstance(guidance, Tensor):  # filled in there: a copy of a number would stop the host
            return torch.full(sigma.shape, guidance, dtype=torch.float32, device=sigma.device)
        return guidance.to(sigma.device, torch.float32).expand(sigma.shape)

    def sigmas(self, raw_steps: Sequence[float], shape: Sequence[int]) -> Tensor:
        scheduler = self._pipe.scheduler
        mu = linear_mu(calculate_shift, scheduler.config, shape[-2] * shape[-1] // PACK**2)
        return schedule(scheduler, sigmas=list(raw_steps), mu=mu)

    def stock_sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        return self.sigmas(evenly_spaced(steps), shape)


BACKBONE = Flux1Backbone
"""The family's backbone."""


def load(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, hardware: HardwareConfig = PLAIN
) -> Flux1Backbone:
    """Load the model that `config` names. Errors as `loading.load_pipeline`."""
    return Flux1Backbone(LAYOUT, load_pipeline(LAYOUT, config, device, dtype, hardware), device, dtype)

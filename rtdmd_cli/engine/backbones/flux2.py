"""FLUX.2-klein (4B and 9B) on diffusers' own pipeline.

Prompt encoding, packing, position ids, the VAE's normalisation and the scheduler's shift (`mu`) are the pipeline's;
none is written again here. Latents are those that the stock pipeline starts from: [B, 128, H/16, W/16], 2 x 2 patches
of the VAE's latents, normalised by the statistics of its batch norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from transformers import Qwen3ForCausalLM

from rtdmd_cli.config.schema import HardwareConfig, ModelConfig
from rtdmd_cli.engine.backbones.base import PLAIN, Conditioning
from rtdmd_cli.engine.backbones.common import (
    PipelineBackbone,
    as_chat,
    check_size,
    evenly_spaced,
    require_unguided,
    schedule,
)
from rtdmd_cli.engine.backbones.layout import Layout
from rtdmd_cli.engine.backbones.loading import load_pipeline
from rtdmd_cli.errors import UsageError

LAYOUT = Layout(
    Flux2KleinPipeline,
    {
        "transformer": Flux2Transformer2DModel,
        "vae": AutoencoderKLFlux2,
        "text_encoder": Qwen3ForCausalLM,
    },
    ("tokenizer",),
)
ENCODE_BATCH = 8  # prompts at once: the encoder keeps the hidden states of every layer
PACK = 2  # the VAE's latent pixels of a token's side
LARGEST = 4096  # px


class Flux2Backbone(PipelineBackbone):
    """See `base.Backbone`. Made by `load`."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        multiple = self._pipe.vae_scale_factor * PACK
        check_size(height, width, multiple, LARGEST)
        return self._pipe.transformer.config.in_channels, height // multiple, width // multiple

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        def part(texts: list[str]) -> Conditioning:
            embeds, _ = self._pipe.encode_prompt(
                prompt=texts, device=self.encoder_device, max_sequence_length=self.text_length
            )
            return Conditioning(embeds)

        return self.encode_in_parts(prompts, ENCODE_BATCH, part)

    def velocity(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float | Tensor = 1.0
    ) -> Tensor:
        assert sigma.shape == x.shape[:1], f"sigma {tuple(sigma.shape)} for x {tuple(x.shape)}"
        require_unguided(guidance)
        pipe, embeds = self._pipe, cond.embeds.to(self.dtype)
        count, _, height, width = x.shape
        positions = self.kept("image", (count, height, width), lambda: pipe._prepare_latent_ids(x))
        texts = self.kept("text", (count, embeds.shape[1], 0), lambda: pipe._prepare_text_ids(embeds))
        v: Tensor = self.transformer(
            hidden_states=pipe._pack_latents(x.to(self.dtype)),
            timestep=sigma.float(),
            guidance=None,
            encoder_hidden_states=embeds,
            txt_ids=texts,
            img_ids=positions,
            return_dict=False,
        )[0]
        unpacked: Tensor = pipe._unpack_latents_with_ids(v, positions, height, width)
        return unpacked.float()

    def texts_read(self, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
        return as_chat(tokenizer, prompts, thinking=False)

    def decode(self, latents: Tensor) -> Tensor:
        vae = self._pipe.vae
        mean = vae.bn.running_mean.float().view(1, -1, 1, 1)
        std = (vae.bn.running_var.float().view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()
        patches = self._pipe._unpatchify_latents(latents * std + mean)
        return self.pictures(patches)

    def sigmas(self, raw_steps: Sequence[float], shape: Sequence[int]) -> Tensor:
        mu = compute_empirical_mu(image_seq_len=shape[-2] * shape[-1], num_steps=len(raw_steps))
        return schedule(self._pipe.scheduler, sigmas=list(raw_steps), mu=mu)

    def stock_sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        return self.sigmas(evenly_spaced(steps), shape)


BACKBONE = Flux2Backbone
"""The family's backbone."""


def load(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, hardware: HardwareConfig = PLAIN
) -> Flux2Backbone:
    """Load the model that `config` names. Errors as `loading.load_pipeline`.

    UsageError for a few-step model as a guided teacher: the stock pipeline ignores guidance there.
    """
    loaded = load_pipeline(LAYOUT, config, device, dtype, hardware)
    if loaded.pipe.config.is_distilled and config.guidance != 1:
        raise UsageError(
            f"{config.path} is a few-step model, which takes no guidance.",
            "Take its base model as the teacher (klein-base), or set model.guidance to 1.",
        )
    return Flux2Backbone(LAYOUT, loaded, device, dtype)

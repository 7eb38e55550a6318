"""Z-Image on diffusers' own pipeline.

Prompt encoding, the order of tokens and the scheduler's shift are the pipeline's; none is written again here. Its network
differs from the other families' in two conventions, which `velocity` turns around as the pipeline does: its time runs
from 0 (noise) to 1 (clean), and it predicts `clean - noise`. Prompts keep lengths of their own: the network takes a list
of them, fills each up to a multiple of 32 tokens with a learnt one and masks the rest.

Guidance: plain classifier-free guidance, which is what the stock pipeline does by default. Its `cfg_normalization` (a bound
on the guided prediction's norm) and `cfg_truncation` (no guidance close to the clean end) are off there and left out here.
Its `guidance_scale` counts from 0: `model.guidance` is one more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift, get_default_z_image_sigmas
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3Model

from rtdmd_cli.config.schema import HardwareConfig, ModelConfig
from rtdmd_cli.engine.backbones.base import PLAIN, Conditioning
from rtdmd_cli.engine.backbones.common import (
    PipelineBackbone,
    as_chat,
    check_size,
    linear_mu,
    require_unguided,
    schedule,
)
from rtdmd_cli.engine.backbones.layout import Layout
from rtdmd_cli.engine.backbones.loading import load_pipeline

LAYOUT = Layout(
    ZImagePipeline,
    {
        "transformer": ZImageTransformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": Qwen3Model,
    },
    ("tokenizer",),
    text_width="cap_feat_dim",
    own_lengths=True,
)
ENCODE_BATCH = 8  # prompts at once: the encoder keeps the hidden states of every layer
PACK = 2  # latent pixels of a token's side


class ZImageBackbone(PipelineBackbone):
    """See `base.Backbone`. Made by `load`."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        scale, config = self._pipe.vae_scale_factor, self._pipe.transformer.config
        check_size(height, width, PACK * scale, PACK * scale * min(config.axes_lens[1:]))
        return config.in_channels, height // scale, width // scale

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        def part(texts: list[str]) -> Conditioning:
            embeds, _ = self._pipe.encode_prompt(
                prompt=texts,
                device=self.encoder_device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.text_length,
            )
            lengths = torch.tensor([len(each) for each in embeds])
            return Conditioning(pad_sequence(embeds, batch_first=True), lengths=lengths)

        return self.encode_in_parts(prompts, ENCODE_BATCH, part)

    def texts_read(self, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
        return as_chat(tokenizer, prompts, thinking=True)

    def velocity(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float | Tensor = 1.0
    ) -> Tensor:
        assert sigma.shape == x.shape[:1], f"sigma {tuple(sigma.shape)} for x {tuple(x.shape)}"
        assert cond.lengths is not None
        require_unguided(guidance)
        rows = zip(cond.embeds.to(self.dtype), cond.lengths.tolist(), strict=True)
        predicted: list[Tensor] = self.transformer(
            list(x.to(self.dtype).unsqueeze(2).unbind()),  # [C, 1, H, W] each: one frame
            1 - sigma.float(),
            [embeds[:length] for embeds, length in rows],
            return_dict=False,
        )[0]
        return -torch.stack(predicted).squeeze(2).float()

    def sigmas(self, raw_steps: Sequence[float], shape: Sequence[int]) -> Tensor:
        scheduler = self._pipe.scheduler
        mu = linear_mu(calculate_shift, scheduler.config, (shape[-2] // PACK) * (shape[-1] // PACK))
        return schedule(scheduler, sigmas=list(raw_steps), mu=mu)

    def stock_sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        return self.sigmas(get_default_z_image_sigmas(steps), shape)


BACKBONE = ZImageBackbone
"""The family's backbone."""


def load(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, hardware: HardwareConfig = PLAIN
) -> ZImageBackbone:
    """Load the model that `config` names. Errors as `loading.load_pipeline`."""
    return ZImageBackbone(LAYOUT, load_pipeline(LAYOUT, config, device, dtype, hardware), device, dtype)

"""Qwen-Image on diffusers' own pipeline.

Prompt encoding, packing, position ids and the scheduler's shift (`mu`) are the pipeline's; none is written again here.
Latents are the VAE's, [B, 16, H/8, W/8], and are packed 2 x 2 for the network alone. The VAE is one for video: a picture is
a film of one frame, and its latents have a mean and a standard deviation for each channel. Prompts keep lengths of their
own; a mask keeps the shorter ones' padding from being looked at.

Guidance: classifier-free guidance whose result is scaled, token by token, to the norm of the conditional prediction, as the
stock pipeline always does; a plain one would be another teacher than the one whose pictures are published. The empty
prompt is "", as for every family (the model's card shows " ", one token more).

Schedule: the scheduler's `shift_terminal` stretches a schedule so that its last level is 0.02. The teacher's many steps
keep it. On four steps it would spend the last one between 0.02 and 0, so the few-step schedule leaves it out, and
an export says so to the stock pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from torch import Tensor
from torch.linalg import vector_norm
from transformers import Qwen2_5_VLForConditionalGeneration

from rtdmd_cli.config.schema import HardwareConfig, ModelConfig
from rtdmd_cli.engine.algo.flow import cfg, move
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
from rtdmd_cli.engine.backbones.loading import load_pipeline
from rtdmd_cli.engine.compute.tiling import TILE

OVERLAP = 4  # tiles of a picture overlap by a quarter


def _tile(vae: Any) -> None:
    """As `compute.tiling.enable_tiling`, in the words of this VAE."""
    stride = TILE - TILE // OVERLAP
    vae.enable_tiling(TILE, TILE, stride, stride)
    vae.enable_slicing()


LAYOUT = Layout(
    QwenImagePipeline,
    {
        "transformer": QwenImageTransformer2DModel,
        "vae": AutoencoderKLQwenImage,
        "text_encoder": Qwen2_5_VLForConditionalGeneration,
    },
    ("tokenizer",),
    own_lengths=True,
    tile=_tile,
)
ENCODE_BATCH = 8  # prompts at once: the encoder keeps the hidden states of every layer
PACK = 2  # latent pixels of a token's side
LARGEST = 4096  # px


class QwenImageBackbone(PipelineBackbone):
    """See `base.Backbone`. Made by `load`."""

    unread = 34  # tokens: the pipeline's template before the prompt

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        scale = self._pipe.vae_scale_factor
        check_size(height, width, PACK * scale, LARGEST)
        return self._pipe.transformer.config.in_channels // PACK**2, height // scale, width // scale

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        def part(texts: list[str]) -> Conditioning:
            embeds, mask = self._pipe.encode_prompt(
                prompt=texts, device=self.encoder_device, max_sequence_length=self.text_length
            )
            whole = torch.full((len(texts),), embeds.shape[1])
            return Conditioning(embeds, lengths=whole if mask is None else mask.sum(1).cpu())

        return self.encode_in_parts(prompts, ENCODE_BATCH, part)

    def texts_read(self, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
        return [self._pipe.prompt_template_encode.format(prompt) for prompt in prompts]

    def velocity(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float | Tensor = 1.0
    ) -> Tensor:
        assert sigma.shape == x.shape[:1], f"sigma {tuple(sigma.shape)} for x {tuple(x.shape)}"
        assert cond.lengths is not None
        require_unguided(guidance)
        count, _, height, width = x.shape
        mask = torch.arange(cond.longest) < cond.lengths.unsqueeze(1)  # in host memory, as the lengths are
        v: Tensor = self.transformer(
            hidden_states=self._packed(x.to(self.dtype)),
            timestep=sigma.float(),
            encoder_hidden_states=cond.embeds[:, : cond.longest].to(self.dtype),
            encoder_hidden_states_mask=None if bool(mask.all()) else move(mask, x.device),
            img_shapes=[[(1, height // PACK, width // PACK)]] * count,
            return_dict=False,
        )[0]
        return self._unpacked(v.float(), height, width)

    def guide(self, v_cond: Tensor, v_uncond: Tensor, guidance: float | Tensor) -> Tensor:
        """Classifier-free guidance with the norm of the conditional prediction, for each token of 2 x 2 latent pixels."""
        height, width = v_cond.shape[-2:]
        own, guided = self._packed(v_cond), self._packed(cfg(v_cond, v_uncond, guidance))
        scale = vector_norm(own, dim=-1, keepdim=True) / vector_norm(guided, dim=-1, keepdim=True)
        return self._unpacked(guided * scale, height, width)

    def _packed(self, x: Tensor) -> Tensor:
        """[B, C, H, W] as tokens [B, H/2 W/2, 4C]."""
        packed: Tensor = self._pipe._pack_latents(x, *x.shape)
        return packed

    def _unpacked(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Back again; height and width in latent pixels."""
        scale = self._pipe.vae_scale_factor
        film: Tensor = self._pipe._unpack_latents(tokens, height * scale, width * scale, scale)
        return film.squeeze(2)

    def decode(self, latents: Tensor) -> Tensor:
        config = self._pipe.vae.config

        def constant(name: str) -> Tensor:
            return self.kept(name, (0, 0, 0), lambda: torch.tensor(config[name]).view(1, -1, 1, 1))

        scaled = latents * constant("latents_std") + constant("latents_mean")
        return self.pictures(scaled.unsqueeze(2))

    def sigmas(self, raw_steps: Sequence[float], shape: Sequence[int]) -> Tensor:
        stock = self._pipe.scheduler
        return self._levels(
            FlowMatchEulerDiscreteScheduler.from_config(stock.config, shift_terminal=None), raw_steps, shape
        )

    def stock_sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        return self._levels(self._pipe.scheduler, evenly_spaced(steps), shape)

    def _levels(self, scheduler: Any, raw_steps: Sequence[float], shape: Sequence[int]) -> Tensor:
        mu = linear_mu(calculate_shift, scheduler.config, shape[-2] * shape[-1] // PACK**2)
        return schedule(scheduler, sigmas=list(raw_steps), mu=mu)


BACKBONE = QwenImageBackbone
"""The family's backbone."""


def load(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, hardware: HardwareConfig = PLAIN
) -> QwenImageBackbone:
    """Load the model that `config` names. Errors as `loading.load_pipeline`."""
    return QwenImageBackbone(LAYOUT, load_pipeline(LAYOUT, config, device, dtype, hardware), device, dtype)

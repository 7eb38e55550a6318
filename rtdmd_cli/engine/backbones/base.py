"""What a model family has to offer, and the table of families.

Latents are `[B, C, H, W]`, sigma is float32 in [0, 1] (0 = clean, 1 = noise), velocities follow
`v = eps - x0` (method, section 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from rtdmd_cli.config.schema import ModelConfig


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: `embeds [B, L, D]`, one row per token, and `pooled [B, P]`, one per prompt."""

    embeds: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def select(self, indices: Sequence[int]) -> Conditioning:
        """The rows `indices`, in that order; a row may be taken several times."""
        rows = torch.as_tensor(indices, dtype=torch.long, device=self.embeds.device)
        return Conditioning(self.embeds[rows], self.pooled[rows])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        return Conditioning(
            self.embeds.to(device=device, dtype=dtype), self.pooled.to(device=device, dtype=dtype)
        )


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """The rows of all `parts`, one after another."""
    return Conditioning(
        torch.cat([part.embeds for part in parts]), torch.cat([part.pooled for part in parts])
    )


@dataclass(frozen=True)
class ModelId:
    """Which weights these are: `hash` is the hub's commit, or the sha256 of a local folder's contents."""

    path: str
    revision: str | None
    hash: str


class Backbone(Protocol):
    """A frozen base model: what training and sampling need of it.

    `transformer` is the network that `engine.roles.Roles` puts adapters on; `device` and `dtype` are its own.
    `encoder_device` is where `encode` computes; it may be changed between calls, and starts as `device`.
    """

    transformer: nn.Module
    device: torch.device
    dtype: torch.dtype
    encoder_device: torch.device

    @property
    def model_id(self) -> ModelId: ...

    @property
    def encoder_key(self) -> str:
        """Names everything that `encode` depends on besides prompt and text length."""
        ...

    @property
    def text_length(self) -> int: ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape [C, H, W] of a picture of `height` x `width` px; UsageError where the model can't do it."""
        ...

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """As the stock pipeline encodes them, on `encoder_device`, without gradient."""
        ...

    def drop_text_encoders(self) -> None:
        """Free the text encoders' memory; `encode` raises RtdmdError from then on."""
        ...

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """v of `x [B, C, H, W]` at `sigma [B]`, under whatever adapters are active; float32 [B, C, H, W]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, height, width], float32 in 0..1; differentiable in `latents`."""
        ...

    def sigmas(self, raw_steps: Sequence[float]) -> Tensor:
        """Raw steps in (0, 1], falling, shifted as the loaded scheduler does.

        float32 [T + 1] on the CPU, ending in 0.
        """
        ...

    def stock_sigmas(self, steps: int) -> Tensor:
        """The stock pipeline's schedule for `num_inference_steps=steps`: float32 [steps + 1] ending in 0."""
        ...


@dataclass(frozen=True)
class Family:
    """One row of the table: the name used in presets, what it covers, and its loader."""

    name: str
    description: str
    load: Callable[[ModelConfig, torch.device, torch.dtype], Backbone]


def _load_sd3(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Backbone:
    from rtdmd_cli.engine.backbones.sd3 import load  # diffusers and transformers take seconds to import

    return load(config, device, dtype)


FAMILIES: dict[str, Family] = {
    "sd3": Family("sd3", "Stable Diffusion 3 and 3.5 Medium, and the built-in shapes model", _load_sd3),
}


def load_backbone(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Backbone:
    """Load the model a preset names. EnvironmentFailure: can't be fetched; DataError: damaged or foreign."""
    return FAMILIES[config.family].load(config, device, dtype)

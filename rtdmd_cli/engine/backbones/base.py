"""What a model family has to offer.

Latents are `[B, C, H, W]`, sigma is float32 in [0, 1] (0 = clean, 1 = noise), velocities follow
`v = eps - x0` (method, section 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from rtdmd_cli.config.schema import HardwareConfig
from rtdmd_cli.engine.algo.flow import move

PLAIN = HardwareConfig()
"""An unquantised base, and pictures decoded whole."""


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: `embeds [B, L, D]`, one row per token, and `pooled [B, P]`, one per prompt.

    pooled: None for families without. Position ids of the text follow from the shapes: a backbone makes them.
    """

    embeds: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return self.embeds.shape[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, those that there are."""
        return {"embeds": self.embeds} | ({} if self.pooled is None else {"pooled": self.pooled})

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def select(self, indices: Sequence[int]) -> Conditioning:
        """The rows `indices`, in that order; a row may be taken several times."""
        rows = move(torch.as_tensor(indices, dtype=torch.long), self.embeds.device)
        return Conditioning(**{name: tensor[rows] for name, tensor in self.tensors.items()})

    def repeat(self, count: int) -> Conditioning:
        """The one row `count` times, without a copy."""
        assert len(self) == 1, len(self)
        return Conditioning(
            **{name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in self.tensors.items()}
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """From host memory without waiting for the work queued on the device, see `algo.flow.move`."""
        queued = self.embeds.device.type == "cpu"
        return Conditioning(
            **{
                name: tensor.to(device=device, dtype=dtype, non_blocking=queued)
                for name, tensor in self.tensors.items()
            }
        )


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """The rows of all `parts`, one after another; all of the same family."""
    return Conditioning(
        **{name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
    )


@dataclass(frozen=True)
class ModelId:
    """Which weights these are: `hash` is the hub's commit, or the sha256 of a local folder's contents."""

    path: str
    revision: str | None
    hash: str


class Backbone(Protocol):
    """A frozen base model: what training and sampling need of it.

    `transformer` is the network that `roles.adapters.Roles` puts adapters on; `device` and `dtype` are its own.
    `encode` loads the text encoders: call `drop_text_encoders` before `transformer` where both don't fit into the memory.
    `encoder_device` is where `encode` computes; it may be changed between calls, and starts as `device`.
    `embedded_guidance`: whether guidance is an input of the network (FLUX.1-dev), and so costs no second evaluation.
    """

    device: torch.device
    dtype: torch.dtype
    encoder_device: torch.device
    embedded_guidance: bool

    @property
    def transformer(self) -> nn.Module:
        """The network; its weights may be loaded at the first call."""
        ...

    @property
    def decoder(self) -> nn.Module:
        """The network behind `decode`."""
        ...

    @property
    def model_id(self) -> ModelId: ...

    @property
    def encoder_key(self) -> str:
        """Names everything that `encode` depends on besides prompt and text length."""
        ...

    @property
    def text_fits(self) -> Mapping[str, str | int]:
        """What encoded prompts have to fit: the pipeline's name as "family", widths D and P as "embeds" and "pooled"."""
        ...

    @property
    def text_length(self) -> int: ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape [C, H, W] of a picture of `height` x `width` px; UsageError where the model can't do it."""
        ...

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """As the stock pipeline encodes them, on `encoder_device`, without gradient."""
        ...

    def excess(self, prompts: Sequence[str]) -> Mapping[str, int]:
        """How many of the prompts are cut off, by the limit they exceed, as in {"the 77 tokens of CLIP": 12}."""
        ...

    def drop_text_encoders(self) -> None:
        """Free the text encoders' memory; `encode` raises RtdmdError from then on."""
        ...

    def velocity(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float | Tensor = 1.0
    ) -> Tensor:
        """v of `x [B, C, H, W]` at `sigma [B]`, under whatever adapters are active; float32 [B, C, H, W].

        guidance: the network's input where it has one (`embedded_guidance`), a number or [B]; else 1.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, height, width], float32 in 0..1; differentiable in `latents`."""
        ...

    def sigmas(self, raw_steps: Sequence[float], shape: Sequence[int]) -> Tensor:
        """Raw steps in (0, 1], falling, shifted as the loaded scheduler does for latents of `shape` [C, H, W].

        float32 [T + 1] on the CPU, ending in 0.
        """
        ...

    def stock_sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        """The stock pipeline's schedule for `num_inference_steps=steps` and latents of `shape` [C, H, W].

        float32 [steps + 1] on the CPU, ending in 0.
        """
        ...

"""What a model family has to offer.

Latents are `[B, C, H, W]`, sigma is float32 in [0, 1] (0 = clean, 1 = noise), velocities follow
`v = eps - x0` (method, section 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rtdmd_cli.config.schema import HardwareConfig
from rtdmd_cli.engine.algo.flow import move

PLAIN = HardwareConfig()
"""An unquantised base, and pictures decoded whole."""
LENGTHS = "lengths"  # of `Conditioning`: stays in host memory


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: `embeds [B, L, D]`, one row per token, and `pooled [B, P]`, one per prompt.

    pooled: None for families without. lengths: int64 [B] in host memory, how many of the L rows are the prompt's own, the
    rest is padding; None for families whose networks read all L. It stays on the host, because the number of tokens shapes
    what is computed, and reading it from a device would stall the queue. Position ids of the text follow from the shapes:
    a backbone makes them.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return self.embeds.shape[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, those that there are."""
        every = {"embeds": self.embeds, "pooled": self.pooled, "lengths": self.lengths}
        return {name: tensor for name, tensor in every.items() if tensor is not None}

    @property
    def longest(self) -> int:
        """Rows of the longest prompt."""
        return self.embeds.shape[1] if self.lengths is None else int(self.lengths.max())

    def row_bytes(self, text_length: int) -> int:
        """Size in bytes of one encoded prompt, of the largest where they differ: `text_length` tokens."""
        if self.lengths is None:
            return self.nbytes // len(self)
        width, rest = self.embeds.shape[-1], self.select([0]).nbytes - self.embeds[:1].nbytes
        return text_length * width * self.embeds.element_size() + rest

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def select(self, indices: Sequence[int]) -> Conditioning:
        """The rows `indices`, in that order; a row may be taken several times."""
        chosen = torch.as_tensor(indices, dtype=torch.long)
        rows = move(chosen, self.embeds.device)
        return Conditioning(
            **{name: tensor[chosen if name == LENGTHS else rows] for name, tensor in self.tensors.items()}
        )

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
                name: tensor
                if name == LENGTHS
                else tensor.to(device=device, dtype=dtype, non_blocking=queued)
                for name, tensor in self.tensors.items()
            }
        )


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """The rows of all `parts`, one after another; all of the same family.

    Where prompts have lengths of their own, all are padded with zeros to the longest.
    """
    if parts[0].lengths is not None:
        longest = max(part.longest for part in parts)
        parts = [replace(part, embeds=_resized(part.embeds, longest)) for part in parts]
    return Conditioning(
        **{name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
    )


def _resized(embeds: Tensor, rows: int) -> Tensor:
    """[B, L, D] as [B, rows, D]: cut off, or padded with zeros."""
    return pad(embeds[:, :rows], (0, 0, 0, max(0, rows - embeds.shape[1])))


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

    def remark(self, guidance: float) -> str:
        """What people should know of this model in a training with the teacher's `guidance`, from "; " on; "" for nothing."""
        ...

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

    def guide(self, v_cond: Tensor, v_uncond: Tensor, guidance: float | Tensor) -> Tensor:
        """The guided velocity as the stock pipeline makes it of both predictions, all [B, C, H, W].

        guidance: a number or [B], in the convention of `algo.flow.cfg`, in which 1 is none.
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

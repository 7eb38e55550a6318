"""What the families' backbones have in common: what surrounds a pipeline of diffusers, and functions over one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rtdmd_cli.engine.algo.flow import cfg
from rtdmd_cli.engine.backbones.base import Conditioning, ModelId, concatenate
from rtdmd_cli.engine.backbones.layout import Layout
from rtdmd_cli.engine.backbones.loading import Loaded
from rtdmd_cli.errors import UsageError


class PipelineBackbone:
    """The parts of `base.Backbone` that are alike for every pipeline of diffusers; a family's class adds the rest.

    layout: what the pipeline's folder holds; loaded: the pipeline and its weights; dtype: the network's.
    """

    embedded_guidance = False
    unread = 0  # tokens before a prompt that the pipeline cuts off again

    def __init__(self, layout: Layout, loaded: Loaded, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.encoder_device = device
        self.dtype = dtype
        self.text_length = loaded.config.text_length
        self._layout = layout
        self._loaded = loaded
        self._pipe = loaded.pipe
        self._kept: dict[tuple[str, int, int, int], Tensor] = {}

    @property
    def transformer(self) -> nn.Module:
        """The network; loaded at the first call."""
        return self._loaded.transformer

    @property
    def decoder(self) -> nn.Module:
        decoder: nn.Module = self._pipe.vae.decoder
        return decoder

    @property
    def model_id(self) -> ModelId:
        return self._loaded.model_id

    @property
    def encoder_key(self) -> str:
        return self._loaded.encoder_key(self.dtype)

    @property
    def text_fits(self) -> dict[str, str | int]:
        config: Any = self._pipe.transformer.config  # known before the weights are loaded
        pooled = self._layout.pooled_width(config)
        known: dict[str, str | int] = {"family": self._layout.pipeline.__name__}
        known["embeds"] = config[self._layout.text_width]
        return known if pooled is None else known | {"pooled": pooled}

    def excess(self, prompts: Sequence[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        for tokenizer in (self._pipe.components.get(name) for name in self._layout.tokenizers):
            if tokenizer is None:
                continue
            kind = type(tokenizer).__name__.partition("Tokenizer")[0]
            limit = tokenizer.model_max_length if kind == "CLIP" else self.text_length
            texts = self.texts_read(tokenizer, prompts)
            count = sum(len(ids) - self.unread > limit for ids in tokenizer(texts)["input_ids"])
            if count:
                found[f"the {limit} tokens of {kind}"] = count
        return found

    def remark(self, guidance: float) -> str:
        return ""

    def texts_read(self, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
        """The prompts in the words around them that the pipeline adds before they are tokenized."""
        return list(prompts)

    def guide(self, v_cond: Tensor, v_uncond: Tensor, guidance: float | Tensor) -> Tensor:
        """Plain classifier-free guidance."""
        return cfg(v_cond, v_uncond, guidance)

    def decode(self, latents: Tensor) -> Tensor:
        """With the scale and shift of an `AutoencoderKL`."""
        config = self._pipe.vae.config
        return self.pictures(latents / config.scaling_factor + config.shift_factor)

    def drop_text_encoders(self) -> None:
        self._loaded.drop_encoders(self.device)

    def encode_in_parts(
        self, prompts: Sequence[str], size: int, encode: Callable[[list[str]], Conditioning]
    ) -> Conditioning:
        """`encode` on `size` prompts at a time. RtdmdError after `drop_text_encoders`.

        The encoders are loaded and move to `encoder_device` only now: with every prompt in the cache they are not needed.
        """
        assert prompts, "no prompts to encode"
        self._loaded.open_encoders()
        for name in self._layout.encoders:
            encoder = self._pipe.components[name]
            if encoder is not None:
                encoder.to(self.encoder_device)
        parts = [list(prompts[start : start + size]) for start in range(0, len(prompts), size)]
        return concatenate([encode(part) for part in parts])

    def kept(self, what: str, sizes: tuple[int, int, int], make: Callable[[], Tensor]) -> Tensor:
        """A constant of the network's input, made once for each triple of sizes: bringing it over would stall the queue."""
        key = (what, *sizes)
        if key not in self._kept:
            self._kept[key] = make().to(self.device)
        return self._kept[key]

    def pictures(self, vae_latents: Tensor) -> Tensor:
        """Decode the VAE's own latents [B,C,H,W]: pictures [B,3,height,width], float32 in 0..1; differentiable.

        A VAE for video takes [B,C,1,H,W] and gives films of one frame.
        """
        vae = self._pipe.vae
        images = vae.decode(vae_latents.to(vae.dtype), return_dict=False)[0]
        if images.ndim == 5:
            images = images[:, :, 0]
        shown: Tensor = self._pipe.image_processor.postprocess(images.float(), output_type="pt")
        return shown


def as_chat(tokenizer: Any, prompts: Sequence[str], thinking: bool) -> list[str]:
    """The prompts in the tokenizer's chat template, each the user's one message. thinking: see Qwen3's template."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        for prompt in prompts
    ]


def check_size(height: int, width: int, multiple: int, largest: int) -> None:
    """UsageError unless both sides (pixels) are multiples of `multiple`, above 0 and at most `largest`."""
    for side in (height, width):
        if side % multiple or not 0 < side <= largest:
            raise UsageError(
                f"This model can't make pictures of {width} x {height} px.",
                f"Use multiples of {multiple} px, {largest} px at most.",
            )


def schedule(scheduler: Any, **arguments: Any) -> Tensor:
    """The sigmas after `scheduler.set_timesteps(**arguments)`: float32 on the CPU, ending in 0."""
    scheduler.set_timesteps(device="cpu", **arguments)
    sigmas: Tensor = scheduler.sigmas.clone()
    return sigmas


def linear_mu(calculate_shift: Callable[..., float], config: Any, tokens: int) -> float:
    """The shift's exponent for a picture of `tokens`; the defaults are those of the stock pipelines' calls.

    calculate_shift: of the pipeline's module. config: the scheduler's.
    """
    return calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )


def require_unguided(guidance: float | Tensor) -> None:
    """For a network without an input for guidance: it is 1, which means none."""
    assert not isinstance(guidance, Tensor) and guidance == 1, guidance


def evenly_spaced(steps: int) -> list[float]:
    """Raw steps `linspace(1, 1/n, n)`, from which the pipelines of FLUX make their schedule."""
    return [(steps - i) / steps for i in range(steps)]

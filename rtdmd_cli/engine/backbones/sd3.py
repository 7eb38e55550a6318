"""Stable Diffusion 3 and 3.5 Medium on diffusers' own pipeline.

Prompt encoding, latent scaling and the scheduler's shift are the pipeline's; none is written again here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from rtdmd_cli.config.schema import ModelConfig
from rtdmd_cli.engine.backbones.base import Conditioning, ModelId, concatenate
from rtdmd_cli.engine.runtime.quiet import quiet_loading
from rtdmd_cli.errors import DataError, EnvironmentFailure, RtdmdError, UsageError

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
NETWORKS: dict[str, Any] = {
    "transformer": SD3Transformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}
OPTIONAL = ("text_encoder_3", "tokenizer_3")  # the stock pipeline runs without T5
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
BUILTIN = {"builtin:shapes": "shapes/weights/sd3"}  # folder inside the package
ENCODE_BATCH = 64  # prompts at once


class SD3Backbone:
    """See `base.Backbone`. Made by `load`."""

    def __init__(
        self,
        pipe: Any,  # StableDiffusion3Pipeline; the libraries' classes carry no types
        config: ModelConfig,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.transformer: nn.Module = pipe.transformer
        self.device = device
        self.encoder_device = device
        self.dtype = dtype
        self.text_length = config.text_length
        self._config = config
        self._folder = folder
        self._pipe = pipe

    @cached_property
    def model_id(self) -> ModelId:
        return ModelId(self._config.path, self._config.revision, folder_hash(self._folder))

    @property
    def encoder_key(self) -> str:
        return f"{self.model_id.hash}:{self.model_id.revision}:{self.dtype}"

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        pipe = self._pipe
        multiple = pipe.vae_scale_factor * pipe.patch_size
        largest = multiple * pipe.transformer.config.pos_embed_max_size
        for side in (height, width):
            if side % multiple or not 0 < side <= largest:
                raise UsageError(
                    f"This model can't make pictures of {width} x {height} px.",
                    f"Use multiples of {multiple} px, {largest} px at most.",
                )
        return (
            pipe.transformer.config.in_channels,
            height // pipe.vae_scale_factor,
            width // pipe.vae_scale_factor,
        )

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        assert prompts, "no prompts to encode"
        pipe = self._pipe
        if pipe.text_encoder is None:
            raise RtdmdError(
                "The text encoders have been freed, so prompts can't be encoded any more.",
                "Encode all prompts before training starts.",
            )
        for encoder in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
            if encoder is not None:
                encoder.to(
                    self.encoder_device
                )  # only now: with every prompt in the cache they are never needed
        parts = []
        for start in range(0, len(prompts), ENCODE_BATCH):
            embeds, _, pooled, _ = pipe.encode_prompt(
                prompt=list(prompts[start : start + ENCODE_BATCH]),
                prompt_2=None,
                prompt_3=None,
                device=self.encoder_device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.text_length,
            )
            parts.append(Conditioning(embeds, pooled))
        return concatenate(parts)

    def drop_text_encoders(self) -> None:
        self._pipe.register_modules(**dict.fromkeys(TEXT_ENCODERS))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        assert sigma.shape == x.shape[:1], f"sigma {tuple(sigma.shape)} for x {tuple(x.shape)}"
        v: Tensor = self.transformer(
            hidden_states=x.to(self.dtype),
            timestep=sigma.float() * self._pipe.scheduler.config.num_train_timesteps,
            encoder_hidden_states=cond.embeds.to(self.dtype),
            pooled_projections=cond.pooled.to(self.dtype),
            return_dict=False,
        )[0]
        return v.float()

    def decode(self, latents: Tensor) -> Tensor:
        vae = self._pipe.vae
        scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
        images = vae.decode(scaled.to(self.dtype), return_dict=False)[0]
        pictures: Tensor = self._pipe.image_processor.postprocess(images.float(), output_type="pt")
        return pictures

    def sigmas(self, raw_steps: Sequence[float]) -> Tensor:
        return self._schedule(sigmas=list(raw_steps))

    def stock_sigmas(self, steps: int) -> Tensor:
        return self._schedule(num_inference_steps=steps)

    def _schedule(self, **arguments: Any) -> Tensor:
        scheduler = self._pipe.scheduler
        scheduler.set_timesteps(device="cpu", **arguments)
        sigmas: Tensor = scheduler.sigmas.clone()
        return sigmas


def load(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> SD3Backbone:
    """Load the pipeline that `config.path` names: frozen, in eval mode, as `dtype`, the transformer and the
    VAE on `device` (the text encoders follow when they are first used).

    A built-in model's name, an existing folder and a hub id are tried in that order; `revision` is the hub's.
    EnvironmentFailure where the hub can't deliver it, DataError where the folder is missing, damaged or holds
    something else, UsageError for an unknown built-in model.
    """
    folder = find_folder(config.path, config.revision)
    present = check_layout(folder)
    try:
        with quiet_loading():
            networks = {name: _load_network(folder, name, dtype) for name in NETWORKS if name in present}
            absent = dict.fromkeys(name for name in OPTIONAL if name not in present)
            pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=dtype, **networks, **absent)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise DataError(f"The model in {folder} can't be loaded: {_first_line(error)}", _RENEW) from error
    if pipe.scheduler.config.use_dynamic_shifting:
        raise DataError(f"The scheduler in {folder} shifts by resolution, which no SD3 model does.", _RENEW)
    for network in networks.values():
        network.eval().requires_grad_(False)
    pipe.transformer.to(device)
    pipe.vae.to(device)
    return SD3Backbone(pipe, config, folder, device, dtype)


_RENEW = "Fetch or save the model again, in the layout of diffusers' StableDiffusion3Pipeline."


def find_folder(path: str, revision: str | None) -> Path:
    """The folder that holds the model; downloads what is missing of a hub model. Errors as `load`."""
    if path.startswith("builtin:"):
        if path not in BUILTIN:
            raise UsageError(f"There is no built-in model {path}.", f"Built in: {', '.join(BUILTIN)}.")
        return Path(str(files("rtdmd_cli"))) / BUILTIN[path]
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path):
        raise DataError(f"There is no model folder {path}.", "Check model.path.")
    try:
        return Path(StableDiffusion3Pipeline.download(path, revision=revision, use_safetensors=True))
    except (OSError, HTTPError, RevisionResolutionError, HFValidationError) as error:
        raise _hub_failure(path, revision, error) from error


def _hub_failure(path: str, revision: str | None, error: Exception) -> EnvironmentFailure:
    """What went wrong with the hub and what to do about it."""
    cause = error.__cause__ or error  # diffusers wraps the hub's own error
    if isinstance(cause, GatedRepoError):
        return EnvironmentFailure(
            f"The model {path} is gated: its licence has to be accepted first.",
            f"Accept it on https://huggingface.co/{path}, then run `hf auth login`.",
        )
    if isinstance(cause, RepositoryNotFoundError):
        return EnvironmentFailure(
            f"There is no folder {path} here, and no public model of that name on the hub.",
            "Check model.path; for a private model run `hf auth login`.",
        )
    if isinstance(cause, RevisionNotFoundError):
        return EnvironmentFailure(f"The model {path} has no revision {revision}.", "Check model.revision.")
    if isinstance(cause, OfflineModeIsEnabled):
        return EnvironmentFailure(
            f"The model {path} is not in the local cache, and the hub is switched off.",
            "Unset HF_HUB_OFFLINE, or set model.path to a folder that holds the model.",
        )
    return EnvironmentFailure(
        f"The model {path} could not be fetched from the hub: {_first_line(cause)}",
        "Check network and disk space and try again, or set model.path to a folder that holds the model.",
    )


def check_layout(folder: Path) -> set[str]:
    """Names of the pipeline's components in `folder`; DataError where it is no complete SD3 pipeline.

    The libraries make up what is missing of a tokenizer or of the weights, in silence; hence this check, and
    the one in `_load_network`.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"The folder {folder} holds no model: model_index.json is missing.", _RENEW) from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder / 'model_index.json'} can't be read: {_first_line(error)}", _RENEW
        ) from error
    pipeline = index.get("_class_name") if isinstance(index, dict) else None
    if pipeline != StableDiffusion3Pipeline.__name__:
        raise DataError(f"The folder {folder} holds a {pipeline}, not a StableDiffusion3Pipeline.", _RENEW)
    present = {name for name in (*NETWORKS, *TOKENIZERS) if index.get(name) not in (None, [None, None])}
    for name in (*NETWORKS, *TOKENIZERS):
        needed = ("config.json",) if name in NETWORKS else VOCABULARIES
        if name not in present and name in OPTIONAL:
            continue
        if not any((folder / name / file).is_file() for file in needed):
            raise DataError(f"The model in {folder} lacks {name}/{' or '.join(needed)}.", _RENEW)
    return present


def _load_network(folder: Path, name: str, dtype: torch.dtype) -> Any:
    """One network of the pipeline, from safetensors only; DataError for weights that are not there."""
    network, info = NETWORKS[name].from_pretrained(
        folder, subfolder=name, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise DataError(f"The weights in {folder / name} are incomplete: {missing[0]} is missing.", _RENEW)
    return network


def folder_hash(folder: Path) -> str:
    """The commit of a snapshot in the hub's cache, else sha256 of names and contents of the model's files."""
    if folder.parent.name == "snapshots":
        return folder.name
    total = hashlib.sha256()
    inside = [folder / "model_index.json"]
    for name in (*NETWORKS, *TOKENIZERS, "scheduler"):
        inside += sorted(path for path in (folder / name).rglob("*") if path.is_file())
    for path in inside:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {digest}\n".encode())
    return total.hexdigest()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__

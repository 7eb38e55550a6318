"""What an export has to know of each model family, and the licences that an export inherits: as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtdmd_cli.config.schema import SHARED_BASE, Preset
from rtdmd_cli.engine.backbones.families import locate_model


@dataclass(frozen=True)
class Licence:
    """id, name, link: the front matter's license, license_name and license_link; text: for people."""

    id: str
    text: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class ComfyFile:
    """A file that a workflow loads. folder: under ComfyUI/models; source: its repository on the hub."""

    name: str
    what: str
    folder: str
    source: str


@dataclass(frozen=True)
class Loader:
    """Nodes of ComfyUI that load a family's parts. model, clip: (class, inputs); vae: None where the model has it.

    files: what these nodes load. needs: the oldest ComfyUI that draws the workflows. tokens: length to which ComfyUI by itself
    pads the prompt of T5 or Qwen3, None where it doesn't; t5: whether the node T5TokenizerOptions changes it. guidance: of a
    FluxGuidance node.
    takes_merged: whether ComfyUI reads the transformer of a merged export. text: a sentence for the card.
    """

    model: tuple[str, Mapping[str, str]]
    clip: tuple[str, Mapping[str, str]]
    vae: str | None
    latent: str
    files: tuple[ComfyFile, ...]
    needs: str
    tokens: int | None
    t5: bool = True
    guidance: float | None = None
    takes_merged: bool = True
    text: str = ""


@dataclass(frozen=True)
class ExportFamily:
    """One row of the table.

    prefix: of the keys of a LoRA file, before the layer's name in diffusers. architecture: modelspec's. index: changes
    of model_index.json of a merged pipeline. comfy: repository id (lower case) -> its nodes; "" for any other. unguided: the
    arguments of the stock pipeline's call that switch guidance off. float32_noise: whether the stock pipeline draws its noise
    in float32, whatever the network's format.
    """

    architecture: Mapping[str, str]
    comfy: Mapping[str, Loader]
    prefix: str = "transformer"
    index: Mapping[str, Any] = field(default_factory=dict)
    unguided: Mapping[str, str] = field(default_factory=lambda: {"guidance_scale": "1.0"})
    float32_noise: bool = False


_BFL = "black-forest-labs/"
_LEVELS = "The levels in the workflows are those of this size: FLUX shifts them by the number of pixels."
_SINCE_MANUAL_SIGMAS = "0.7.0"  # the node ManualSigmas
_SINCE_FLUX2_KEYS = "0.10.0"  # LoRA keys of FLUX.2's fused layers
BUILTIN = "builtin:"


def comfyui_knows(base: str) -> bool:
    """Whether ComfyUI can load the base model: it knows no SD3 with 8 latent channels and heads of 32, the built-in one."""
    return not base.startswith(BUILTIN)


def _sd3(checkpoint: str, repo: str) -> Loader:
    encoders = ("clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors")
    names = {f"clip_name{i}": name for i, name in enumerate(encoders, 1)}
    return Loader(
        ("CheckpointLoaderSimple", {"ckpt_name": checkpoint}),
        ("TripleCLIPLoader", names),
        None,
        "EmptySD3LatentImage",
        files=(
            ComfyFile(checkpoint, "base model and VAE", "checkpoints", repo),
            *(ComfyFile(name, "text encoder", "text_encoders", repo) for name in encoders),
        ),
        needs=_SINCE_MANUAL_SIGMAS,
        tokens=77,
    )


def _klein(unet: str, repo: str, encoder: str, parts: str) -> Loader:
    model, clip, vae = f"{unet}.safetensors", f"{encoder}.safetensors", "flux2-vae.safetensors"
    return Loader(
        ("UNETLoader", {"unet_name": model, "weight_dtype": "default"}),
        ("CLIPLoader", {"clip_name": clip, "type": "flux2"}),
        vae,
        "EmptyFlux2LatentImage",
        files=(
            ComfyFile(model, "base model", "diffusion_models", f"{_BFL}{repo}"),
            ComfyFile(clip, "text encoder", "text_encoders", f"Comfy-Org/{parts}"),
            ComfyFile(vae, "VAE", "vae", f"Comfy-Org/{parts}"),
        ),
        needs=_SINCE_FLUX2_KEYS,
        tokens=512,
        t5=False,
        takes_merged=False,
        text=_LEVELS,
    )


def _klein_4b(unet: str, repo: str) -> Loader:
    return _klein(unet, repo, "qwen_3_4b", "vae-text-encorder-for-flux-klein-4b")


def _klein_9b(unet: str, repo: str) -> Loader:
    return _klein(unet, repo, "qwen_3_8b_fp8mixed", "vae-text-encorder-for-flux-klein-9b")


_SD35 = "stabilityai/stable-diffusion-3.5-medium"
_FLUX1 = f"{_BFL}FLUX.1-dev"
_FLUX1_ENCODERS = "comfyanonymous/flux_text_encoders"

FAMILIES: dict[str, ExportFamily] = {
    "sd3": ExportFamily(
        architecture={"": "stable-diffusion-v3-medium", _SD35: "stable-diffusion-v3.5-medium"},
        comfy={
            "": _sd3("sd3_medium.safetensors", "stabilityai/stable-diffusion-3-medium"),
            _SD35: _sd3("sd3.5_medium.safetensors", _SD35),
        },
    ),
    "flux1": ExportFamily(
        architecture={"": "flux-1-dev"},
        comfy={
            "": Loader(
                ("UNETLoader", {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}),
                (
                    "DualCLIPLoader",
                    {
                        "clip_name1": "t5xxl_fp16.safetensors",
                        "clip_name2": "clip_l.safetensors",
                        "type": "flux",
                    },
                ),
                "ae.safetensors",
                "EmptySD3LatentImage",
                files=(
                    ComfyFile("flux1-dev.safetensors", "base model", "diffusion_models", _FLUX1),
                    ComfyFile("t5xxl_fp16.safetensors", "text encoder", "text_encoders", _FLUX1_ENCODERS),
                    ComfyFile("clip_l.safetensors", "text encoder", "text_encoders", _FLUX1_ENCODERS),
                    ComfyFile("ae.safetensors", "VAE", "vae", _FLUX1),
                ),
                needs=_SINCE_MANUAL_SIGMAS,
                tokens=256,
                guidance=1.0,
                text=_LEVELS,
            )
        },
    ),
    "flux2": ExportFamily(
        architecture={
            "": "flux-2-klein-4b",
            f"{_BFL}flux.2-klein-base-4b": "flux-2-klein-base-4b",
            f"{_BFL}flux.2-klein-9b": "flux-2-klein-9b",
            f"{_BFL}flux.2-klein-base-9b": "flux-2-klein-base-9b",
        },
        comfy={
            "": _klein_4b("flux-2-klein-4b", "FLUX.2-klein-4B"),
            f"{_BFL}flux.2-klein-base-4b": _klein_4b("flux-2-klein-base-4b", "FLUX.2-klein-base-4B"),
            f"{_BFL}flux.2-klein-9b": _klein_9b("flux-2-klein-9b", "FLUX.2-klein-9B"),
            f"{_BFL}flux.2-klein-base-9b": _klein_9b("flux-2-klein-base-9b", "FLUX.2-klein-base-9B"),
        },
        index={"is_distilled": True},
    ),
    "zimage": ExportFamily(
        architecture={"": "z-image"},
        comfy={
            "": Loader(
                ("UNETLoader", {"unet_name": "z_image_bf16.safetensors", "weight_dtype": "default"}),
                ("CLIPLoader", {"clip_name": "qwen_3_4b.safetensors", "type": "lumina2"}),
                "ae.safetensors",
                "EmptySD3LatentImage",
                files=(
                    ComfyFile(
                        "z_image_bf16.safetensors", "base model", "diffusion_models", "Comfy-Org/z_image"
                    ),
                    ComfyFile(
                        "qwen_3_4b.safetensors", "text encoder", "text_encoders", "Comfy-Org/z_image_turbo"
                    ),
                    ComfyFile("ae.safetensors", "VAE", "vae", "Comfy-Org/z_image_turbo"),
                ),
                needs=_SINCE_MANUAL_SIGMAS,
                tokens=None,
                t5=False,
            )
        },
        unguided={"guidance_scale": "0.0"},  # its scale counts from 0
        float32_noise=True,
    ),
}
"""Family of the preset -> its row."""


def _other(repo: str, text: str, name: str) -> Licence:
    return Licence("other", text, name, f"https://huggingface.co/{repo}/blob/main/LICENSE.md")


def _stability(repo: str) -> Licence:
    return _other(repo, "Stability AI Community License", "stabilityai-ai-community")


_APACHE = Licence("apache-2.0", "Apache 2.0")
LICENCES: dict[str, Licence] = {
    "builtin:shapes": _APACHE,
    f"{_BFL}flux.1-dev": _other(
        "black-forest-labs/FLUX.1-dev",
        "FLUX.1 [dev] Non-Commercial License",
        "flux-1-dev-non-commercial-license",
    ),
    "tongyi-mai/z-image": _APACHE,
    f"{_BFL}flux.2-klein-4b": _APACHE,
    f"{_BFL}flux.2-klein-base-4b": _APACHE,
    **{
        repo.lower(): _other(repo, "FLUX Non-Commercial License", "flux-non-commercial-license")
        for repo in (f"{_BFL}FLUX.2-klein-9B", f"{_BFL}FLUX.2-klein-base-9B")
    },
    **{
        repo: _stability(repo)
        for repo in (
            "stabilityai/stable-diffusion-3-medium-diffusers",
            "stabilityai/stable-diffusion-3.5-medium",
        )
    },
}
"""Base model (lower case) -> its licence."""
UNKNOWN = Licence("other", "look it up where that model came from")


def generator_base(preset: Preset) -> str:
    """The base model that the generator's adapters belong to: a hub id, a built-in name or a path."""
    own = preset.model.generator_init
    return preset.model.path if own == SHARED_BASE else own


def generator_revision(preset: Preset) -> str | None:
    """Its pinned revision, if it has one."""
    model = preset.model
    return model.revision if model.generator_init == SHARED_BASE else model.generator_revision


def licence_of(base: str) -> Licence:
    """The licence that an export of this base model inherits."""
    return LICENCES.get(base.lower(), UNKNOWN)


def row(table: Mapping[str, Any], base: str) -> Any:
    """The row of a base model, or the row for any other ("")."""
    return table.get(base.lower(), table[""])


@dataclass(frozen=True)
class Bases:
    """Where the generator's base model lies. pipeline: a whole folder, whose transformer counts unless there is another.

    transformer: the folder of the weights that are adapted; None where they are the single `file`.
    """

    pipeline: Path
    transformer: Path | None
    file: Path | None

    @property
    def own(self) -> bool:
        """Whether the transformer is not the pipeline's."""
        return self.transformer != self.pipeline / "transformer"

    @property
    def read(self) -> list[Path]:
        """All of them."""
        return [path for path in (self.pipeline, self.transformer, self.file) if path is not None]


def find_bases(preset: Preset) -> Bases:
    """Where the generator's base model lies; downloads what is missing, loads nothing. Errors as `load_backbone`."""
    found = locate_model(preset.model)
    if found.generator is not None:
        return Bases(found.folder, found.generator / "transformer", None)
    if found.file is not None:
        return Bases(found.folder, None, found.file)
    return Bases(found.folder, found.folder / "transformer", None)

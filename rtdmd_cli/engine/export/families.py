"""What an export has to know of each model family, and the licences that an export inherits: as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtdmd_cli.config.schema import Preset


@dataclass(frozen=True)
class Licence:
    """id, name, link: the front matter's license, license_name and license_link; text: for people."""

    id: str
    text: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Loader:
    """Nodes of ComfyUI that load a family's parts. model, clip: (class, inputs); vae: None where the model has it."""

    model: tuple[str, Mapping[str, str]]
    clip: tuple[str, Mapping[str, str]]
    vae: str | None
    latent: str
    guidance: float | None = None  # of a FluxGuidance node
    text: str = ""


@dataclass(frozen=True)
class ExportFamily:
    """One row of the table.

    prefix: of the keys of a LoRA file, before the layer's name in diffusers. architecture: modelspec's. index: changes
    of model_index.json of a merged pipeline. comfy: repository id (lower case) -> its nodes; "" for any other.
    """

    architecture: Mapping[str, str]
    comfy: Mapping[str, Loader]
    prefix: str = "transformer"
    index: Mapping[str, Any] = field(default_factory=dict)


_SD3_CLIP = (
    "TripleCLIPLoader",
    {
        "clip_name1": "clip_l.safetensors",
        "clip_name2": "clip_g.safetensors",
        "clip_name3": "t5xxl_fp16.safetensors",
    },
)
_SD3_TEXT = (
    "ComfyUI pads the T5 prompt to 77 tokens; this model was trained with {text_length}, and the padding is not "
    "masked, so its pictures differ a little from those of diffusers."
)


def _sd3(checkpoint: str) -> Loader:
    model = ("CheckpointLoaderSimple", {"ckpt_name": checkpoint})
    return Loader(model, _SD3_CLIP, None, "EmptySD3LatentImage", text=_SD3_TEXT)


FAMILIES: dict[str, ExportFamily] = {
    "sd3": ExportFamily(
        architecture={
            "": "stable-diffusion-v3-medium",
            "stabilityai/stable-diffusion-3.5-medium": "stable-diffusion-v3.5-medium",
        },
        comfy={
            "": _sd3("sd3_medium.safetensors"),
            "stabilityai/stable-diffusion-3.5-medium": _sd3("sd3.5_medium.safetensors"),
        },
    ),
}
"""Family of the preset -> its row."""


def _other(repo: str, text: str, name: str) -> Licence:
    return Licence("other", text, name, f"https://huggingface.co/{repo}/blob/main/LICENSE.md")


def _stability(repo: str) -> Licence:
    return _other(repo, "Stability AI Community License", "stabilityai-ai-community")


LICENCES: dict[str, Licence] = {
    "builtin:shapes": Licence("apache-2.0", "Apache 2.0"),
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
    return preset.model.path


def licence_of(base: str) -> Licence:
    """The licence that an export of this base model inherits."""
    return LICENCES.get(base.lower(), UNKNOWN)


def row(table: Mapping[str, Any], base: str) -> Any:
    """The row of a base model, or that of any other ("")."""
    return table.get(base.lower(), table[""])


@dataclass(frozen=True)
class Bases:
    """Folders that the generator's base model lies in: the pipeline, and the transformer that is adapted."""

    pipeline: Path
    transformer: Path


def base_folders(preset: Preset) -> Bases:
    """Where the generator's base model lies; errors as `load_backbone`, and nothing is loaded."""
    from rtdmd_cli.engine.backbones.sd3 import find_folder  # diffusers takes seconds to import

    folder = find_folder(preset.model.path, preset.model.revision)
    return Bases(folder, folder / "transformer")

"""What a family's file says: its published models, and what an export has to know. Data; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
class Names:
    """What ComfyUI calls a transformer's tensors. changed: part of diffusers' name -> its own.

    joined: parts of names whose tensors it keeps as one matrix, their rows in this order; under: the part in its name.
    """

    changed: Mapping[str, str]
    joined: tuple[str, ...]
    under: str


@dataclass(frozen=True)
class Loader:
    """Nodes of ComfyUI that load a family's parts. model, clip: (class, inputs); vae: None where the model has it.

    files: what these nodes load. needs: the oldest ComfyUI that draws the workflows. tokens: length to which ComfyUI by itself
    pads the prompt of T5 or Qwen3, None where it doesn't; t5: whether the node T5TokenizerOptions changes it. guidance: of a
    FluxGuidance node.
    takes_merged: whether ComfyUI reads the transformer of a merged export. names: of its tensors, where not all versions
    since `needs` read diffusers'. text: sentences for the card.
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
    names: Names | None = None
    text: str = ""


@dataclass(frozen=True)
class ExportFamily:
    """What an export has to know of a family.

    prefix: of the keys of a LoRA file, before the layer's name in diffusers. architecture: modelspec's. index: changes
    of model_index.json of a merged pipeline. comfy: repository id (lower case) -> its nodes; "" for any other. unguided: the
    arguments of the stock pipeline's call that switch guidance off. float32_noise: whether the stock pipeline draws its noise
    in float32, whatever the network's format. rounded_levels: whether it tells the network a level of noise, times 1,000, in
    the latents' format. scheduler: changes of the stock scheduler's configuration that the few-step schedule needs.
    """

    architecture: Mapping[str, str]
    comfy: Mapping[str, Loader]
    prefix: str = "transformer"
    index: Mapping[str, Any] = field(default_factory=dict)
    unguided: Mapping[str, str] = field(default_factory=lambda: {"guidance_scale": "1.0"})
    float32_noise: bool = False
    rounded_levels: bool = False
    scheduler: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """A published model. size: bytes, roughly, of what has to be fetched: in bf16, by the numbers of parameters.

    None for what belongs to the package.
    """

    licence: Licence
    size: float | None


@dataclass(frozen=True)
class FamilyFacts:
    """One family. description: for people; models: hub id, or a built-in model's name -> what is published there."""

    description: str
    models: Mapping[str, Published]
    export: ExportFamily


APACHE = Licence("apache-2.0", "Apache 2.0")
UNKNOWN = Licence("other", "look it up where that model came from")
SINCE_MANUAL_SIGMAS = "0.7.0"
"""The oldest ComfyUI with the node ManualSigmas, which every workflow needs."""
SHIFTED_LEVELS = "The levels in the workflows are those of this size: {} shifts them by the number of pixels."
FULL_ENCODER = (
    "The text encoder in these workflows is in 8 bits, as in ComfyUI's own; the full one, `{}` of the same repository, is "
    "nearer to training."
)


def other_licence(repository: str, text: str, name: str) -> Licence:
    """A licence of the model's own, in its repository."""
    return Licence("other", text, name, f"https://huggingface.co/{repository}/blob/main/LICENSE.md")

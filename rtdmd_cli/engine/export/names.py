"""How an export calls things: its own files, and the models that it names."""

from __future__ import annotations

from pathlib import Path

from rtdmd_cli.engine.export.code import Place
from rtdmd_cli.engine.export.families import BUILTIN
from rtdmd_cli.engine.storage.scrubbing import scrub

COMFYUI = "comfyui"  # folder of an export


def export_name(label: str) -> str:
    """What the files are called: run and step, as in `mine-step-000500`. label: of a `sampling.source.Source`."""
    return label.replace("/", "-")


def comfyui_lora(name: str) -> str:
    """The LoRA for ComfyUI, in the export's folder."""
    return f"{COMFYUI}/{name}.safetensors"


def public_name(path: str) -> str:
    """A base model as a card may name it: a hub id or built-in name as it is, of a local path the last part."""
    return path if path.startswith(BUILTIN) or is_hub_id(path) else Path(path).name


def is_hub_id(path: str) -> bool:
    """Whether a model's path is a repository: no local folder, two parts, as `backbones` reads it."""
    parts = path.split("/")
    local = Path(path).expanduser().exists() or path.startswith(("/", ".", "~", BUILTIN))
    return not local and len(parts) == 2 and all(parts)


def local_name(path: str) -> str:
    """A model's path without home and user name, which still opens on this machine where it lies under the home."""
    return path if is_hub_id(path) else scrub([path])[0]


def place_of(path: str) -> Place:
    """A base model as a card's code loads it: by its hub id or built-in name, else from where it lies on this machine."""
    if path.startswith(BUILTIN) or is_hub_id(path):
        return Place(path)
    here = local_name(str(Path(path).expanduser().resolve()))
    return Place(
        here, f"where {Path(path).name} lies on the machine of this export; on another: its place there"
    )

"""The LoRA files of an export and the workflows of ComfyUI."""

from __future__ import annotations

from pathlib import Path

from rtdmd_cli import __version__
from rtdmd_cli.engine.export.canvas import drawn
from rtdmd_cli.engine.export.card_comfyui import ETA_NOTE, SEEDS_NOTE, length_note
from rtdmd_cli.engine.export.comfyui import Scene, cps_workflow, euler_workflow, numbered
from rtdmd_cli.engine.export.facts import Facts
from rtdmd_cli.engine.export.families import comfyui_knows, row
from rtdmd_cli.engine.export.fold import Folded
from rtdmd_cli.engine.export.names import COMFYUI, comfyui_lora
from rtdmd_cli.engine.families.facts import ExportFamily
from rtdmd_cli.engine.storage import files
from rtdmd_cli.engine.storage.lora_files import DIFFUSERS_NAME, header, lora_tensors, write_lora


def write_loras(folder: Path, facts: Facts, family: ExportFamily, folded: Folded) -> None:
    """The LoRA for diffusers and for ComfyUI."""
    model = facts.preset.model
    tensors = lora_tensors(folded.layers, family.prefix)
    architecture = row(family.architecture, facts.base)
    head = header(
        {
            "architecture": f"{architecture}/lora",
            "implementation": "diffusers",
            "title": facts.name,
            "description": f"{facts.steps}-step generator, distilled from {facts.base} with RTDMD by rtdmd {__version__}",
            "license": facts.licence.text,
            "resolution": f"{model.resolution}x{model.resolution}",
            "merged_from": facts.base,
            "usage_hint": f"{facts.steps} steps, no guidance, text length {model.text_length}",
        }
    )
    for name in lora_files(facts).values():
        write_lora(folder / name, tensors, head)


def lora_files(facts: Facts) -> dict[str, str]:
    """Format -> its LoRA file in the folder; the same tensors in each."""
    every = {"diffusers": DIFFUSERS_NAME, "comfyui": comfyui_lora(facts.name)}
    return {name: file for name, file in every.items() if name in facts.formats}


def write_workflows(folder: Path, facts: Facts) -> None:
    """The workflows of ComfyUI, for its window and for its API: of the LoRA and of the merged transformer."""
    model, eta, name = facts.preset.model, facts.preset.sampler.eta, facts.name
    scenes = []
    if "comfyui" in facts.formats:
        scenes.append((name, False))
    if "merged" in facts.formats and facts.loader.takes_merged and comfyui_knows(facts.base):
        scenes.append((f"{name}-merged", True))
    for file, whole in scenes:
        scene = Scene(
            loader=facts.loader,
            model=f"{name}.safetensors",
            merged=whole,
            prompt=facts.prompts[0],
            side=model.resolution,
            sigmas=facts.sigmas,
            text_length=model.text_length,
            name=name,
        )
        for kind, nodes, note in (
            ("euler", euler_workflow(scene), length_note(facts)),
            ("cps", cps_workflow(scene, eta), f"{SEEDS_NOTE}\n\n{ETA_NOTE}\n\n{length_note(facts)}"),
        ):
            files.write_json(folder / COMFYUI / f"{file}-{kind}.json", drawn(nodes, note))
            files.write_json(folder / COMFYUI / f"{file}-{kind}-api.json", numbered(nodes))

"""A workflow as ComfyUI's window saves it: with places, frames and a note, so that it can be read when it is opened.

The format is that of its saved workflows (version 0.4). A node's settings stand there without names, in the order of its
class, a seed followed by what becomes of it after a picture; hence the table of the classes that `comfyui` uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rtdmd_cli.engine.export.comfyui import Workflow

COLUMN, ROW, WIDTH = 370, 40, 330  # px


@dataclass(frozen=True)
class NodeClass:
    """links: inputs that are links, in order, with their types; settings: the others; outputs: names and types."""

    links: Mapping[str, str]
    settings: tuple[str, ...]
    outputs: Mapping[str, str]


MODEL, CLIP, VAE, LATENT, COND = "MODEL", "CLIP", "VAE", "LATENT", "CONDITIONING"
CLASSES = {
    "CheckpointLoaderSimple": NodeClass({}, ("ckpt_name",), {MODEL: MODEL, CLIP: CLIP, VAE: VAE}),
    "UNETLoader": NodeClass({}, ("unet_name", "weight_dtype"), {MODEL: MODEL}),
    "CLIPLoader": NodeClass({}, ("clip_name", "type"), {CLIP: CLIP}),
    "DualCLIPLoader": NodeClass({}, ("clip_name1", "clip_name2", "type"), {CLIP: CLIP}),
    "TripleCLIPLoader": NodeClass({}, ("clip_name1", "clip_name2", "clip_name3"), {CLIP: CLIP}),
    "VAELoader": NodeClass({}, ("vae_name",), {VAE: VAE}),
    "LoraLoaderModelOnly": NodeClass({"model": MODEL}, ("lora_name", "strength_model"), {MODEL: MODEL}),
    "T5TokenizerOptions": NodeClass({"clip": CLIP}, ("min_padding", "min_length"), {CLIP: CLIP}),
    "CLIPTextEncode": NodeClass({"clip": CLIP}, ("text",), {COND: COND}),
    "FluxGuidance": NodeClass({"conditioning": COND}, ("guidance",), {COND: COND}),
    "EmptySD3LatentImage": NodeClass({}, ("width", "height", "batch_size"), {LATENT: LATENT}),
    "EmptyFlux2LatentImage": NodeClass({}, ("width", "height", "batch_size"), {LATENT: LATENT}),
    "ManualSigmas": NodeClass({}, ("sigmas",), {"SIGMAS": "SIGMAS"}),
    "KSamplerSelect": NodeClass({}, ("sampler_name",), {"SAMPLER": "SAMPLER"}),
    "SamplerEulerAncestral": NodeClass({}, ("eta", "s_noise"), {"SAMPLER": "SAMPLER"}),
    "SamplerCustom": NodeClass(
        {
            "model": MODEL,
            "positive": COND,
            "negative": COND,
            "sampler": "SAMPLER",
            "sigmas": "SIGMAS",
            "latent_image": LATENT,
        },
        ("add_noise", "noise_seed", "cfg"),
        {"output": LATENT, "denoised_output": LATENT},
    ),
    "VAEDecode": NodeClass({"samples": LATENT, "vae": VAE}, (), {"IMAGE": "IMAGE"}),
    "SaveImage": NodeClass({"images": "IMAGE"}, ("filename_prefix",), {}),
}
"""Class -> its inputs and outputs, as in ComfyUI's nodes.py and comfy_extras."""

COLUMNS = (
    ("model", "clip", "vae"),
    ("lora", "length", "empty"),
    ("text", "guidance"),
    ("decode", "save"),
)
"""Titles by columns, from the left; a column a step stands before the last one."""


def drawn(nodes: Workflow, note: str) -> dict[str, Any]:
    """The workflow as a file that the window opens. nodes: of `comfyui`, keyed by titles; note: text of a yellow node."""
    numbers = {title: number for number, title in enumerate(nodes, 1)}
    links: list[list[Any]] = []
    shown = {title: _shown(title, node, numbers, links) for title, node in nodes.items()}
    for number, source, slot, *_ in links:
        node = next(each for each in shown.values() if each["id"] == source)
        node["outputs"][slot]["links"].append(number)
    groups = _placed(shown)
    text = _note(len(nodes) + 1, note)
    return {
        "last_node_id": len(nodes) + 1,
        "last_link_id": len(links),
        "nodes": [*shown.values(), text],
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _shown(
    title: str, node: dict[str, Any], numbers: Mapping[str, int], links: list[list[Any]]
) -> dict[str, Any]:
    """One node without a place; its links are appended to `links` as [id, from, output, to, input, type]."""
    known, inputs = CLASSES[node["class_type"]], []
    for slot, (name, kind) in enumerate(known.links.items()):
        source, output = node["inputs"][name]
        links.append([len(links) + 1, numbers[source], output, numbers[title], slot, kind])
        inputs.append({"name": name, "type": kind, "link": len(links)})
    values: list[Any] = []
    for name in known.settings:
        values += [node["inputs"][name], *(["fixed"] if name == "noise_seed" else [])]
    assert len(known.links) + len(known.settings) == len(node["inputs"]), node
    return {
        "id": numbers[title],
        "type": node["class_type"],
        "title": title,
        "pos": [0, 0],
        "size": [WIDTH, _height(node["class_type"])],
        "flags": {},
        "order": numbers[title] - 1,
        "mode": 0,
        "inputs": inputs,
        "outputs": [
            {"name": name, "type": kind, "links": [], "slot_index": slot}
            for slot, (name, kind) in enumerate(known.outputs.items())
        ],
        "properties": {"Node name for S&R": node["class_type"]},
        "widgets_values": values,
    }


def _height(name: str) -> int:
    """px: a title, a row a slot and a setting, and room for a prompt or a picture."""
    known = CLASSES[name]
    extra = {"CLIPTextEncode": 120, "SaveImage": 300, "SamplerCustom": 160}.get(name, 0)
    return 40 + 24 * (max(len(known.links), len(known.outputs)) + len(known.settings)) + extra


def _placed(shown: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Give every node its place; the frames around the steps."""
    steps = [title.removeprefix("sample").strip() for title in shown if title.split()[0] == "sample"]
    columns = [*COLUMNS[:-1], *(_step(step) for step in steps), COLUMNS[-1]]
    used = [[title for title in column if title in shown] for column in columns]
    assert sum(map(len, used)) == len(shown)
    groups = []
    for index, column in enumerate(used):
        y = 0
        for title in column:
            shown[title]["pos"] = [COLUMN * index, y]
            y += shown[title]["size"][1] + 2 * ROW
        if len(COLUMNS) - 1 <= index < len(used) - 1:
            levels = shown[column[0]]["widgets_values"][0]
            frame = [COLUMN * index - 10, -2 * ROW, WIDTH + 20, y + ROW]
            groups.append({"title": f"noise {levels.replace(', ', ' to ')}", "bounding": frame})
    return groups


def _step(step: str) -> tuple[str, ...]:
    return tuple(f"{part} {step}".strip() for part in ("levels", "sampler", "sample"))


def _note(number: int, text: str) -> dict[str, Any]:
    """A node of the window that holds text and takes no part."""
    return {
        "id": number,
        "type": "Note",
        "pos": [0, -6 * ROW - 20],
        "size": [2 * COLUMN, 4 * ROW],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [text],
    }

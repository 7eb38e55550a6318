"""Workflows: what ComfyUI's nodes would compute, restated here from its public source."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from rtdmd_cli.engine.algo.flow import cps_step, to_x0
from rtdmd_cli.engine.export.canvas import CLASSES, drawn
from rtdmd_cli.engine.export.comfyui import (
    SEEDS,
    Scene,
    Workflow,
    ancestral_eta,
    cps_workflow,
    euler_workflow,
    later_seed,
    numbered,
)
from rtdmd_cli.engine.export.families import FAMILIES, row

SIGMAS = (1.0, 0.8999999761581421, 0.75, 0.5, 0.0)


def ancestral(x: Tensor, x0: Tensor, sigma: float, sigma_next: float, eta: float, noise: Tensor) -> Tensor:
    """One step of `sample_euler_ancestral_RF`: down to a level below, scaled, and noised up again."""
    down = sigma_next * (1 + (sigma_next / sigma - 1) * eta)
    stepped = x0 + down / sigma * (x - x0)
    shrunk = (1 - sigma_next) / (1 - down)
    return shrunk * stepped + (sigma_next**2 - (shrunk * down) ** 2) ** 0.5 * noise


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_node_a_step_is_cps(eta: float, step: int) -> None:
    random = torch.Generator().manual_seed(step)
    x, v, noise = (torch.randn(2, 4, 3, 3, generator=random, dtype=torch.float64) for _ in range(3))
    sigma, sigma_next = SIGMAS[step : step + 2]
    x0 = to_x0(x, sigma, v)
    own = ancestral_eta(sigma, sigma_next, eta)
    found = ancestral(x, x0, sigma, sigma_next, own, noise)
    assert torch.allclose(found, cps_step(x, v, sigma, sigma_next, eta, noise), atol=1e-9)
    assert own + 1e-9 >= 0 and own <= 100  # the node's range


def read_sigmas(text: str) -> list[float]:
    """As ManualSigmas reads them."""
    return torch.tensor([float(number) for number in re.findall(r"[-+]?(?:\d*\.*\d+)", text)]).tolist()


def by_class(workflow: Workflow, name: str) -> list[dict[str, Any]]:
    return [node["inputs"] for node in workflow.values() if node["class_type"] == name]


def scene(family: str, base: str = "", merged: bool = False) -> Scene:
    return Scene(
        loader=row(FAMILIES[family].comfy, base),
        model="mine.safetensors",
        merged=merged,
        prompt="a ring",
        side=512,
        sigmas=SIGMAS,
        text_length=128,
        name="mine",
    )


def workflows(scene: Scene) -> list[Workflow]:
    return [numbered(euler_workflow(scene)), numbered(cps_workflow(scene, 0.9))]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_workflows_are_complete(family: str) -> None:
    euler, cps = workflows(scene(family))
    for workflow in (euler, cps):
        assert json.loads(json.dumps(workflow)) == workflow
        for node in workflow.values():
            links = [value for value in node["inputs"].values() if isinstance(value, list)]
            assert all(link[0] in workflow and link[1] in (0, 1, 2) for link in links)
        loras = [node["lora_name"] for node in by_class(workflow, "LoraLoaderModelOnly")]
        assert loras == ["mine.safetensors"]
        assert all(node["cfg"] == 1.0 for node in by_class(workflow, "SamplerCustom"))
        guidance = [node["guidance"] for node in by_class(workflow, "FluxGuidance")]
        assert guidance == [1.0] * (family == "flux1")
    assert read_sigmas(by_class(euler, "ManualSigmas")[0]["sigmas"]) == list(SIGMAS)
    pairs = [tuple(read_sigmas(node["sigmas"])) for node in by_class(cps, "ManualSigmas")]
    assert pairs == list(pairwise(SIGMAS))
    samplers = by_class(cps, "SamplerCustom")
    assert [node["add_noise"] for node in samplers] == [True, False, False, False]
    assert len(by_class(cps, "SamplerEulerAncestral")) == 3


@pytest.mark.parametrize("family", list(FAMILIES))
def test_text_has_the_length_of_the_training(family: str) -> None:
    """T5's prompt goes through the node that pads it; a Qwen's is padded by ComfyUI itself, or not at all."""
    t5 = family in ("sd3", "flux1")
    for workflow in workflows(scene(family)):
        lengths = [node["min_length"] for node in by_class(workflow, "T5TokenizerOptions")]
        assert lengths == ([128] if t5 else [])
        (text,) = by_class(workflow, "CLIPTextEncode")
        source = workflow[text["clip"][0]]["class_type"]
        assert source == ("T5TokenizerOptions" if t5 else "CLIPLoader")


def test_no_two_steps_of_a_picture_share_their_noise() -> None:
    """Whatever small seed the first node is given; it was 1 or 2 that repeated a later node's."""
    samplers = by_class(numbered(cps_workflow(scene("sd3"), 0.9)), "SamplerCustom")
    seeds = [node["noise_seed"] for node in samplers]
    assert seeds == [later_seed(0, step) for step in range(4)] and seeds[0] == 0
    assert not set(seeds[1:]) & set(range(1_000_000))
    for first in (0, 1, 2, 12345, SEEDS - 1):
        assert len({later_seed(first, step) for step in range(1000)}) == 1000
        assert all(0 <= later_seed(first, step) < 2**53 for step in range(4))


@pytest.mark.parametrize("family", ["sd3", "flux1", "zimage", "qwenimage"])
def test_a_merged_transformer_takes_the_place_of_model_and_lora(family: str) -> None:
    for workflow in workflows(scene(family, merged=True)):
        assert not by_class(workflow, "LoraLoaderModelOnly")
        (loader,) = by_class(workflow, "UNETLoader")
        assert loader == {"unet_name": "mine.safetensors", "weight_dtype": "default"}
        (decode,) = by_class(workflow, "VAEDecode")
        node, output = decode["vae"]
        source = ("CheckpointLoaderSimple", 2) if family == "sd3" else ("VAELoader", 0)
        assert (workflow[node]["class_type"], output) == source


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_window_gets_the_same_nodes_side_by_side(family: str, merged: bool) -> None:
    """The same links and settings as the API's, no two nodes on the same place, every step in a frame."""
    for nodes, steps in (
        (euler_workflow(scene(family, merged=merged)), 1),
        (cps_workflow(scene(family, merged=merged), 0.9), 4),
    ):
        window, api = drawn(nodes, "a note"), numbered(nodes)
        assert json.loads(json.dumps(window)) == window and len(window["groups"]) == steps
        shown = {str(node["id"]): node for node in window["nodes"] if node["type"] != "Note"}
        links = {link[0]: link for link in window["links"]}
        assert shown.keys() == api.keys()
        for number, node in shown.items():
            given = api[number]["inputs"]
            known = CLASSES[node["type"]]
            assert (
                node["type"] == api[number]["class_type"] and {*known.links, *known.settings} == given.keys()
            )
            values = [value for value in node["widgets_values"] if value != "fixed"]
            assert values == [given[name] for name in known.settings]
            for slot, entry in enumerate(node["inputs"]):
                _, source, output, target, place, kind = links[entry["link"]]
                assert [str(source), output] == given[entry["name"]] and (str(target), place) == (
                    number,
                    slot,
                )
                end = shown[str(source)]["outputs"][output]
                assert entry["link"] in end["links"] and end["type"] == kind == entry["type"]
        assert not overlapping([(*node["pos"], *node["size"]) for node in window["nodes"]])


def overlapping(boxes: list[tuple[int, int, int, int]]) -> bool:
    return any(
        x < u + w and u < x + a and y < v + h and v < y + b
        for i, (x, y, a, b) in enumerate(boxes)
        for u, v, w, h in boxes[:i]
    )


def test_small_levels_are_written_without_an_exponent() -> None:
    levels = (1.0, 0.00001, 0.0)
    few = replace(scene("sd3"), sigmas=levels)
    text = by_class(numbered(euler_workflow(few)), "ManualSigmas")[0]["sigmas"]
    assert read_sigmas(text) == torch.tensor(levels).tolist()

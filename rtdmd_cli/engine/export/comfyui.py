"""Workflows for ComfyUI, as nodes and links: the format of its API. `canvas` lays them out for its window.

What the nodes do was read in ComfyUI's public source: comfy_extras/nodes_custom_sampler.py (ManualSigmas takes decimal
numbers without an exponent; SamplerCustom hands `noise_seed` to the sampler even where it adds no noise itself),
comfy_extras/nodes_cond.py (T5TokenizerOptions sets the length to which T5 prompts are padded) and
comfy/k_diffusion/sampling.py (`euler_ancestral` of a flow model is `sample_euler_ancestral_RF`).

`euler` is eta 0. The sampler that the model was trained with, CPS with an eta between, is made of one sampling node a
step. `sample_euler_ancestral_RF` with its own eta h goes down to s_d = s' (1 + (s'/s - 1) h), then scales by
(1 - s')/(1 - s_d) and adds noise up to the level s'. Its two terms are those of CPS (method, section 2) where

    s_d / (1 - s_d) (1 - s') = s' cos(eta pi/2)

Through the API that is exact to six decimals of h; the window rounds h to two.

Seeds. A sampler draws a step's noise from its node's seed as the first node draws the initial noise from its own, so that
equal seeds would mean equal noise. The node of step k therefore has the seed `later_seed(first, k)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rtdmd_cli.engine.families.facts import Loader

Workflow = dict[str, dict[str, Any]]
Link = list[Any]  # [node, output]
SEED_STRIDE, SEEDS = 1_000_000_007, 2**50  # the window draws seeds below 2^50


@dataclass(frozen=True)
class Scene:
    """What a workflow draws. model: the LoRA's file under ComfyUI/models/loras, or, if `merged`, the transformer's under
    diffusion_models; side: pixels; sigmas: T + 1 noise levels down to 0; text_length: tokens; name: of the pictures' files.
    """

    loader: Loader
    model: str
    merged: bool
    prompt: str
    side: int
    sigmas: Sequence[float]
    text_length: int
    name: str


def later_seed(first: int, step: int) -> int:
    """The seed of step `step` (0 is the first) of a picture whose first seed is `first`."""
    return (first + step * SEED_STRIDE) % SEEDS


def ancestral_eta(sigma: float, sigma_next: float, eta: float) -> float:
    """The eta of `euler_ancestral` whose step from sigma to sigma_next (> 0) is the CPS step with `eta`."""
    odds = math.cos(eta * math.pi / 2) * sigma_next / (1 - sigma_next)
    down = odds / (1 + odds)
    return (1 - down / sigma_next) / (1 - sigma_next / sigma)


def euler_workflow(scene: Scene) -> Workflow:
    """All steps in one node, deterministic. The nodes' keys are their titles; `numbered` makes them the API's."""
    nodes, links = _common(scene)
    nodes["levels"] = _node("ManualSigmas", sigmas=_decimals(scene.sigmas))
    nodes["sampler"] = _node("KSamplerSelect", sampler_name="euler")
    nodes["sample"] = _sampler(links, ["sampler", 0], ["levels", 0], ["empty", 0], 0, add_noise=True)
    return nodes | _picture(["sample", 0], links, scene.name)


def cps_workflow(scene: Scene, eta: float) -> Workflow:
    """A node a step, each with fresh noise, as in training. The first node's seed is the picture's. As above."""
    nodes, links = _common(scene)
    latent: Link = ["empty", 0]
    for step, (sigma, sigma_next) in enumerate(pairwise(scene.sigmas)):
        nodes[f"levels {step}"] = _node("ManualSigmas", sigmas=_decimals((sigma, sigma_next)))
        if sigma_next > 0:
            own = ancestral_eta(sigma, sigma_next, eta)
            nodes[f"sampler {step}"] = _node("SamplerEulerAncestral", eta=round(own, 6), s_noise=1.0)
        else:
            nodes[f"sampler {step}"] = _node("KSamplerSelect", sampler_name="euler")
        nodes[f"sample {step}"] = _sampler(
            links,
            [f"sampler {step}", 0],
            [f"levels {step}", 0],
            latent,
            later_seed(0, step),
            add_noise=step == 0,
        )
        latent = [f"sample {step}", 0]
    return nodes | _picture(latent, links, scene.name)


def _common(scene: Scene) -> tuple[Workflow, dict[str, Link]]:
    """Loaders, LoRA, prompt and empty latent; the links to model, conditioning and VAE."""
    loader = scene.loader
    nodes: Workflow = {"clip": _node(loader.clip[0], **loader.clip[1])}
    links: dict[str, Link] = {"model": ["model", 0], "cond": ["text", 0], "vae": ["vae", 0]}
    own = _node(loader.model[0], **loader.model[1])
    if scene.merged:
        nodes["model"] = _node("UNETLoader", unet_name=scene.model, weight_dtype="default")
    else:
        nodes |= {
            "model": own,
            "lora": _node(
                "LoraLoaderModelOnly", model=["model", 0], lora_name=scene.model, strength_model=1.0
            ),
        }
        links["model"] = ["lora", 0]
    if loader.vae is not None:
        nodes["vae"] = _node("VAELoader", vae_name=loader.vae)
    elif scene.merged:
        nodes["vae"], links["vae"] = own, ["vae", 2]  # the original's checkpoint, for its VAE alone
    else:
        links["vae"] = ["model", 2]
    text: Link = ["clip", 0]
    if loader.t5:
        nodes["length"] = _node("T5TokenizerOptions", clip=text, min_padding=0, min_length=scene.text_length)
        text = ["length", 0]
    nodes["text"] = _node("CLIPTextEncode", clip=text, text=scene.prompt)
    nodes["empty"] = _node(loader.latent, width=scene.side, height=scene.side, batch_size=1)
    if loader.guidance is not None:
        nodes["guidance"] = _node("FluxGuidance", conditioning=["text", 0], guidance=loader.guidance)
        links["cond"] = ["guidance", 0]
    return nodes, links


def _sampler(
    links: Mapping[str, Link], sampler: Link, sigmas: Link, latent: Link, seed: int, add_noise: bool
) -> dict[str, Any]:
    """cfg 1: ComfyUI then leaves the negative prompt out, so the positive one stands in for it."""
    return _node(
        "SamplerCustom",
        model=links["model"],
        add_noise=add_noise,
        noise_seed=seed,
        cfg=1.0,
        positive=links["cond"],
        negative=links["cond"],
        sampler=sampler,
        sigmas=sigmas,
        latent_image=latent,
    )


def _picture(latent: Link, links: Mapping[str, Link], name: str) -> Workflow:
    return {
        "decode": _node("VAEDecode", samples=latent, vae=links["vae"]),
        "save": _node("SaveImage", images=["decode", 0], filename_prefix=name),
    }


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def _decimals(sigmas: Sequence[float]) -> str:
    """Numbers that ManualSigmas reads back to the same float32."""
    return ", ".join(f"{sigma:.9f}".rstrip("0").rstrip(".") for sigma in sigmas)


def numbered(nodes: Workflow) -> Workflow:
    """A workflow as the API takes it: its keys are numbers as text; the names become titles."""
    numbers = {name: str(number) for number, name in enumerate(nodes, 1)}

    def linked(value: Any) -> Any:
        return [numbers[value[0]], value[1]] if isinstance(value, list) else value

    return {
        numbers[name]: {
            "class_type": node["class_type"],
            "inputs": {key: linked(value) for key, value in node["inputs"].items()},
            "_meta": {"title": name},
        }
        for name, node in nodes.items()
    }

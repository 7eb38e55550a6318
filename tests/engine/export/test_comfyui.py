"""Workflows: what ComfyUI's nodes would compute, restated here from its public source."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from rtdmd_cli.engine.algo.flow import cps_step, to_x0
from rtdmd_cli.engine.export.comfyui import Workflow, ancestral_eta, cps_workflow, euler_workflow
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


@pytest.mark.parametrize("family", list(FAMILIES))
def test_workflows_are_complete(family: str) -> None:
    loader = row(FAMILIES[family].comfy, "anything")
    euler = euler_workflow(loader, "mine.safetensors", "a ring", 512, SIGMAS, "mine")
    cps = cps_workflow(loader, "mine.safetensors", "a ring", 512, SIGMAS, 0.9, "mine")
    for workflow in (euler, cps):
        assert json.loads(json.dumps(workflow)) == workflow
        for node in workflow.values():
            links = [value for value in node["inputs"].values() if isinstance(value, list)]
            assert all(link[0] in workflow and link[1] in (0, 1, 2) for link in links)
        assert [node["lora_name"] for node in by_class(workflow, "LoraLoaderModelOnly")] == [
            "mine.safetensors"
        ]
        assert all(node["cfg"] == 1.0 for node in by_class(workflow, "SamplerCustom"))
        assert [node["guidance"] for node in by_class(workflow, "FluxGuidance")] == [1.0] * (
            family == "flux1"
        )
    assert read_sigmas(by_class(euler, "ManualSigmas")[0]["sigmas"]) == list(SIGMAS)
    pairs = [tuple(read_sigmas(node["sigmas"])) for node in by_class(cps, "ManualSigmas")]
    assert pairs == list(pairwise(SIGMAS))
    samplers = by_class(cps, "SamplerCustom")
    assert [node["add_noise"] for node in samplers] == [True, False, False, False]
    assert len({node["noise_seed"] for node in samplers}) == 4  # equal seeds would mean equal noise
    assert len(by_class(cps, "SamplerEulerAncestral")) == 3


def test_small_levels_are_written_without_an_exponent() -> None:
    loader = row(FAMILIES["sd3"].comfy, "")
    levels = (1.0, 0.00001, 0.0)
    text = by_class(euler_workflow(loader, "m", "p", 32, levels, "m"), "ManualSigmas")[0]["sigmas"]
    assert read_sigmas(text) == torch.tensor(levels).tolist()

"""Where and how prompts are encoded: in 8 bits close to plain, kept apart in the cache, on the device that is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from rtdmd_cli.config.schema import HardwareConfig, ModelConfig
from rtdmd_cli.engine.backbones.base import LENGTHS, Backbone
from rtdmd_cli.engine.backbones.families import load_backbone
from rtdmd_cli.engine.compute.quantise import shrink_encoder
from rtdmd_cli.errors import EnvironmentFailure
from tests.tiny_flux import FAMILIES, tiny_config
from tests.tiny_models import PROMPTS, sd3_config

CPU = torch.device("cpu")
CONFIGS: dict[str, Callable[[], ModelConfig]] = {
    "sd3": sd3_config,
    **{name: functools.partial(tiny_config, name) for name in FAMILIES if name != "sd35"},
}
ERROR = 0.05
"""Stated: largest relative error of the small models' embeddings in 8 bits."""


def load(config: ModelConfig, text_encoder: str) -> Backbone:
    return load_backbone(config, CPU, torch.float32, HardwareConfig(text_encoder=text_encoder))


@pytest.mark.parametrize("family", CONFIGS)
def test_encoders_in_8_bits_are_close_to_plain_ones(family: str) -> None:
    config = CONFIGS[family]()
    plain, small = load(config, "auto"), load(config, "int8")
    assert plain.encoder_key != small.encoder_key and small.encoder_key.endswith(":int8")
    right, near = plain.encode(PROMPTS), small.encode(PROMPTS)
    assert right.tensors.keys() == near.tensors.keys()
    for name, tensor in right.tensors.items():
        if name == LENGTHS:
            assert torch.equal(near.tensors[name], tensor)
            continue
        error = float((near.tensors[name] - tensor).norm() / tensor.norm())
        assert 0 < error < ERROR, (name, error)
    plain.encoder_device = torch.device("meta")
    try:
        where = plain.encode(PROMPTS).embeds.device.type
    except RuntimeError:  # flux2's pipeline asks for values, which this device does not have
        where = "meta"
    assert where == "meta"


def test_eight_bits_are_refused_where_they_have_not_been_tried() -> None:
    with pytest.raises(EnvironmentFailure, match="text encoders can't be quantised on mps") as caught:
        shrink_encoder(nn.Linear(4, 4), torch.device("mps"))
    assert "hardware.text_encoder" in caught.value.hint

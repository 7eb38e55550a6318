"""The host's memory while networks are loaded: what is counted, and what the real loaders take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.config.schema import ModelConfig
from rtdmd_cli.engine.backbones.families import FAMILIES
from rtdmd_cli.engine.backbones.loading import load_network
from rtdmd_cli.engine.planning.host import (
    GENERATOR,
    LOAD_ENCODERS,
    LOAD_TRANSFORMER,
    PROCESS,
    TRANSFORMER,
    formats,
    loading,
)

ENCODERS = {"text_encoder": 3, "text_encoder_2": 90}
MAPS = Path("/proc/self/maps")


def model(name: str, **changes: Any) -> ModelConfig:
    return load_preset(name, [], {}).preset.model.model_copy(update=changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A transformer in bf16 with a bias in float32, an encoder in fp16, and one with files of two formats."""
    for name, kinds in (
        ("transformer", [torch.bfloat16]),
        ("text_encoder", [torch.float16]),
        ("text_encoder_2", [torch.bfloat16, torch.float32]),
    ):
        (tmp_path / name).mkdir()
        for number, kind in enumerate(kinds):
            tensors = {"weight": torch.zeros(2, 2, dtype=kind), "bias": torch.zeros(2)}
            save_file(tensors, tmp_path / name / f"model-{number}.safetensors")
        index = {"weight_map": {f"layer.{i}": f"model-{i}.safetensors" for i in range(len(kinds))}}
        (tmp_path / name / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_formats_of_files_at_hand(folder: Path) -> None:
    found = formats(model("flux1-4step", path=str(folder)), ENCODERS)
    assert found == {"transformer": torch.bfloat16, "text_encoder": torch.float16}
    own = formats(model("sd3-4step", generator_init=str(folder)), ENCODERS)
    assert own == {GENERATOR: torch.bfloat16}


def test_a_damaged_file_has_no_format(folder: Path) -> None:
    (folder / "transformer/model-0.safetensors").write_bytes(b"not that")
    assert TRANSFORMER not in formats(model("flux1-4step", path=str(folder)), ENCODERS)


def test_formats_of_repositories() -> None:
    assert set(formats(model("flux1-4step"), ENCODERS).values()) == {torch.bfloat16}
    assert formats(model("sd3-4step"), ENCODERS) == {}


@pytest.mark.parametrize(
    ("packed", "on_card", "first"), [(True, True, 90), (False, True, 93), (False, False, 93)]
)
def test_networks_of_an_unknown_format_are_counted_whole(packed: bool, on_card: bool, first: int) -> None:
    bases = {TRANSFORMER: 200, GENERATOR: 210}
    found = loading(model("sd3-4step"), torch.bfloat16, bases, ENCODERS, packed, on_card, 7)
    assert found == {LOAD_ENCODERS: PROCESS + first, LOAD_TRANSFORMER: PROCESS + 7 + 210}


@pytest.mark.parametrize(("on_card", "first"), [(True, 0), (False, 93)])
def test_mapped_networks_take_nothing_until_they_are_used_on_the_host(on_card: bool, first: int) -> None:
    found = loading(model("flux1-4step"), torch.bfloat16, {TRANSFORMER: 200}, ENCODERS, False, on_card, 7)
    assert found == {LOAD_ENCODERS: PROCESS + first, LOAD_TRANSFORMER: PROCESS + 7}
    other = loading(model("flux1-4step"), torch.float16, {TRANSFORMER: 200}, ENCODERS, False, on_card, 7)
    assert other == {LOAD_ENCODERS: PROCESS + 93, LOAD_TRANSFORMER: PROCESS + 207}


def mapped(network: Any) -> float:
    """The share of a network's bytes that lie in a file of weights which is mapped into memory."""
    ranges = [
        tuple(int(end, 16) for end in line.split(maxsplit=1)[0].split("-"))
        for line in MAPS.read_text(encoding="utf-8").splitlines()
        if line.endswith(".safetensors")
    ]
    inside, total = 0, 0
    for tensor in network.parameters():
        total += tensor.nbytes
        inside += tensor.nbytes * any(low <= tensor.data_ptr() < high for low, high in ranges)
    return inside / total


@pytest.mark.skipif(not MAPS.is_file(), reason="no /proc here")
@pytest.mark.parametrize("name", ["transformer", "text_encoder_2"])
def test_the_real_loaders_map_files_of_the_right_format(name: str, tmp_path: Path) -> None:
    """By diffusers and by transformers; in another format they copy."""
    if name == "transformer":
        shape = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
        made: Any = FluxTransformer2DModel(**shape, joint_attention_dim=16, axes_dims_rope=(4, 6, 6))
    else:
        made = T5EncoderModel(T5Config(d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8, vocab_size=50))
    made.to(torch.bfloat16).save_pretrained(tmp_path / name)
    layout = FAMILIES["flux1"].module().LAYOUT
    for dtype, least, most in ((torch.bfloat16, 0.9, 1.0), (torch.float16, 0.0, 0.0)):
        network = load_network(layout, tmp_path, name, dtype)
        assert least <= mapped(network) <= most and next(network.parameters()).dtype == dtype

"""The Python of a card: of a single file it hands diffusers the transformer's tensors alone, by names that it converts."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from rtdmd_cli.engine.backbones.single_file import Stored, stored_as
from rtdmd_cli.engine.export.code import join_code, tensor_lines
from rtdmd_cli.engine.export.families import FAMILIES
from tests.other_names import FLUX1_CONFIG, write_flux1_as_released, zimage_in_comfyui
from tests.tiny_flux import FP8, tiny_folder


def made(path: Path) -> dict[str, Tensor]:
    """The `tensors` of a card's lines."""
    names: dict[str, Any] = {"path": str(path), "load_file": load_file}
    exec("\n".join(tensor_lines(stored_as(path))), names)
    tensors: dict[str, Tensor] = names["tensors"]
    return tensors


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_transformer_alone_is_taken_from_a_file_with_other_parts(
    tmp_path: Path, prefix: str, scaled: bool
) -> None:
    """A text encoder in 8 bits with scales says nothing of how the transformer is stored."""
    weight, scale = torch.full((2, 2), 1.5).to(FP8), torch.tensor([2.0, 4.0])
    encoder = {"text_encoders.a.weight": weight.clone(), "text_encoders.a.scale_weight": torch.ones(1)}
    own = {"a.weight": weight} | ({"a.scale_weight": scale} if scaled else {})
    file = tmp_path / "whole.safetensors"
    save_file({f"{prefix}{key}": tensor for key, tensor in own.items()} | encoder, file)
    assert stored_as(file) == Stored(prefix, scaled)
    found = made(file)
    assert found.keys() == {"a.weight"}
    assert torch.equal(found["a.weight"].float(), weight.float() * (scale[:, None] if scaled else 1))


@pytest.mark.parametrize("norms", ["weight", "scale"])
def test_flux1s_norms_have_the_name_that_diffusers_converts(tmp_path: Path, norms: str) -> None:
    file = write_flux1_as_released(tmp_path / "flux1.safetensors", norms)
    tensors = {key: tensor.to("meta") for key, tensor in made(file).items()}
    converted = convert_flux_transformer_checkpoint_to_diffusers(tensors)
    with torch.device("meta"):
        expected = FluxTransformer2DModel.from_config(FLUX1_CONFIG).state_dict()
    assert {key: tensor.shape for key, tensor in converted.items()} == {
        key: tensor.shape for key, tensor in expected.items()
    }
    assert not tensors


def test_a_merged_zimage_gets_comfyuis_names(tmp_path: Path) -> None:
    """In two shards, with a query's weight in another than its key's. The names are those of Comfy-Org's own files."""
    ours = load_file(tiny_folder("zimage") / "transformer/diffusion_pytorch_model.safetensors")
    (tmp_path / "transformer").mkdir()
    for number in range(2):
        part = {key: ours[key] for key in sorted(ours)[number::2]}
        save_file(part, tmp_path / f"transformer/{number}.safetensors")
    code = join_code("mine.safetensors", FAMILIES["zimage"].comfy[""].names)
    with contextlib.chdir(tmp_path):
        exec(code.removeprefix("```python\n").removesuffix("```"), {})
    found, expected = load_file(tmp_path / "mine.safetensors"), zimage_in_comfyui(ours)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

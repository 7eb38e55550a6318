"""A transformer in a single file: kinds of files, scales of 8-bit weights, and tensors that nobody would use."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from rtdmd_cli.engine.backbones.layout import hub_commit
from rtdmd_cli.engine.backbones.single_file import read_transformer, scaled
from rtdmd_cli.errors import DataError
from tests.other_names import FLUX1_CONFIG, write_flux1_as_released
from tests.tiny_flux import FAMILIES, FP8, in_fp8, load_tiny, tiny_folder

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def own(family: str) -> dict[str, Tensor]:
    return load_file(tiny_folder(family) / WEIGHTS)


def written(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def loaded(family: str, path: Path) -> dict[str, Tensor]:
    backbone = load_tiny(family, path=path, components=str(tiny_folder(family)))
    return dict(backbone.transformer.state_dict())


@pytest.mark.parametrize(("scale", "rows"), [("scale_weight", False), ("weight_scale", True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_scales_of_8_bit_weights_are_multiplied_in(
    tmp_path: Path, family: str, scale: str, rows: bool
) -> None:
    stored, meant = in_fp8(own(family), scale, rows)
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in stored.items()}
    file = written(tmp_path / "mine.safetensors", prefixed | {"first_stage_model.x": torch.ones(1)})
    found = loaded(family, file)
    assert all(torch.equal(found[name], tensor) for name, tensor in meant.items())
    assert any(not torch.equal(tensor, own(family)[name]) for name, tensor in meant.items())


@pytest.mark.parametrize("ending", [".sft", ".SAFETENSORS"])
def test_other_endings_of_the_same_files(tmp_path: Path, ending: str) -> None:
    tensors = own("flux2")
    found = loaded("flux2", written(tmp_path / f"mine{ending}", tensors))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tensor_that_is_not_used_or_missing_is_named(tmp_path: Path, family: str) -> None:
    tensors = own(family)
    file = written(tmp_path / "more.safetensors", tensors | {"extra.weight": torch.ones(2)})
    with pytest.raises(DataError, match=r"tensor extra\.weight is not used"):
        loaded(family, file)
    name = sorted(tensors)[0]
    del tensors[name]
    with pytest.raises(DataError, match=f"tensor {name} is missing"):
        loaded(family, written(tmp_path / "less.safetensors", tensors))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_checked_at_once_and_read_when_the_encoders_have_left(tmp_path: Path, family: str) -> None:
    tensors = own(family)
    parts = {"path": written(tmp_path / "mine.safetensors", tensors), "components": str(tiny_folder(family))}
    backbone = load_tiny(family, **parts)
    backbone.encode(["a ring"])
    assert all(parameter.is_meta for parameter in backbone._pipe.transformer.parameters())
    backbone.drop_text_encoders()
    found = backbone.transformer.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    cut = written(tmp_path / "cut.safetensors", tensors | {name: tensors[name][:-1]})
    with pytest.raises(DataError, match=f"its tensor {re.escape(name)} has another shape"):
        load_tiny(family, **parts | {"path": cut})


def described(kind: str) -> Tensor:
    """A layer's description in a file of ComfyUI."""
    return torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise"])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 1)])
def test_a_scale_for_a_layer_or_for_each_row(kind: str, shape: tuple[int, ...]) -> None:
    weight = torch.arange(8.0).reshape(4, 2).to(FP8)
    scale = torch.arange(1.0, 1 + math.prod(shape)).reshape(shape)
    stored = {"a.weight": weight, "a.weight_scale": scale, "a.comfy_quant": described(kind)}
    found = scaled(stored, Path("mine"), torch.float32)
    rows = scale.reshape(-1, 1)
    assert found.keys() == {"a.weight"} and torch.equal(found["a.weight"], weight.float() * rows)


@pytest.mark.parametrize("shape", [(2, 2), (1, 4), (4, 1, 1), (1, 1), (2,)])
def test_scales_of_blocks_are_no_rows_scales(shape: tuple[int, ...]) -> None:
    """A weight [M, N] in blocks of n has M/n x N/n of them: as many as rows where N is n squared."""
    stored = {"a.weight": torch.ones(4, 4).to(FP8), "a.weight_scale": torch.ones(shape)}
    with pytest.raises(DataError, match=r"stores a\.weight in a format") as caught:
        scaled(stored, Path("mine"), torch.float32)
    assert "scales of layers or rows" in caught.value.hint


def test_newer_names_of_flux1s_norms(tmp_path: Path) -> None:
    file = write_flux1_as_released(tmp_path / "mine.safetensors", norms="weight")
    shapes = read_transformer(file, FluxTransformer2DModel, FLUX1_CONFIG, torch.bfloat16, shapes_only=True)
    older = write_flux1_as_released(tmp_path / "older.safetensors", norms="scale")
    expected = read_transformer(older, FluxTransformer2DModel, FLUX1_CONFIG, torch.bfloat16, shapes_only=True)
    assert shapes.keys() == expected.keys() and "single_transformer_blocks.0.attn.norm_k.weight" in shapes


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("blocks", {"a.comfy_quant": described("nvfp4")}, "nvfp4"),
        ("blockwise", {"a.comfy_quant": described("float8_e4m3fn_blockwise")}, "float8_e4m3fn_blockwise"),
        ("alone", {"a.scale_weight": torch.ones(1)}, "stores a.weight in a format"),
        (
            "whole",
            {"a.weight": torch.ones(2, 2), "a.weight_scale": torch.ones(1)},
            "stores a.weight in a format",
        ),
    ],
)
def test_scales_that_are_not_understood(
    tmp_path: Path, name: str, tensors: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        loaded("flux1", written(tmp_path / f"{name}.safetensors", own("flux1") | tensors))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", ["transformer.x.lora_A.weight", "lora_unet_x.lora_down.weight"])
def test_a_lora_is_no_model(tmp_path: Path, family: str, key: str) -> None:
    file = written(tmp_path / "style.safetensors", {key: torch.ones(2, 2)})
    with pytest.raises(DataError, match="is a LoRA") as caught:
        loaded(family, file)
    assert "model.path" in caught.value.hint


def test_other_kinds_of_files_are_named(tmp_path: Path) -> None:
    for name, kind in (("m.gguf", "GGUF"), ("m.CKPT", "pickle"), ("m.pt", "pickle")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(DataError, match=kind):
            load_tiny("sd3", path=tmp_path / name)
    root = tmp_path / "models--a--b"
    (root / "snapshots" / "1234").mkdir(parents=True)
    with pytest.raises(DataError, match="root of a cache of the hub") as caught:
        load_tiny("sd3", path=root)
    assert str(root / "snapshots/1234") in caught.value.hint
    written(tmp_path / "broken.safetensors", {"x": torch.ones(1)})
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    with pytest.raises(DataError, match="can't be read"):
        loaded("sd3", tmp_path / "broken.safetensors")


def test_another_scheduler_is_refused_when_loading(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder("sd3"), tmp_path / "heun"))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"][1] = "FlowMatchHeunDiscreteScheduler"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="FlowMatchHeunDiscreteScheduler"):
        load_tiny("sd3", path=folder)


def test_a_commit_counts_in_a_cache_of_the_hub_alone(tmp_path: Path) -> None:
    """ModelScope calls every download `snapshots/master`; two models would be known by the same name."""
    for model, name, expected in (
        ("models--a--b", "c0ffee0" * 5 + "c0ffe", "c0ffee0" * 5 + "c0ffe"),
        ("models--a--b", "master", None),
        ("a--b", "c0ffee0" * 5 + "c0ffe", None),
    ):
        folder = tmp_path / model / "snapshots" / name
        folder.mkdir(parents=True)
        (tmp_path / model / "blobs").mkdir(exist_ok=True)
        assert hub_commit(folder) == expected
    first, second = (
        Path(shutil.copytree(tiny_folder("sd3"), tmp_path / f"m--{n}" / "snapshots" / "master")) for n in "ab"
    )
    known = load_tiny("sd3", path=first)
    changed = load_file(second / WEIGHTS)
    changed["proj_out.bias"] += 1
    save_file(changed, second / WEIGHTS, {"format": "pt"})
    other = load_tiny("sd3", path=second)
    assert known.model_id.hash != other.model_id.hash and known.encoder_key != other.encoder_key

"""Merged weights: shards, number formats, and what is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rtdmd_cli.engine.export.fold import Folded
from rtdmd_cli.engine.export.merged import WEIGHTS, stored_dtype, weight_files, write_transformer
from rtdmd_cli.errors import DataError

A, B = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.ones(4, 2)
FOLDED = Folded({"second": (A, B)}, 2, 2, 0.0)


def sharded(folder: Path, dtype: torch.dtype) -> Path:
    folder.mkdir()
    first, second = {"first.weight": torch.ones(2, 2)}, {"second.weight": torch.full((4, 3), 0.5).to(dtype)}
    save_file(first, folder / "diffusion_pytorch_model-00001-of-00002.safetensors", {"format": "pt"})
    save_file(second, folder / "diffusion_pytorch_model-00002-of-00002.safetensors", {"format": "pt"})
    names = {"first.weight": "00001", "second.weight": "00002"}
    weights = {key: f"diffusion_pytorch_model-{n}-of-00002.safetensors" for key, n in names.items()}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    (folder / "config.json").write_text("{}")
    (folder / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a variant")
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_shard_keeps_its_format(tmp_path: Path, dtype: torch.dtype) -> None:
    base = sharded(tmp_path / "base", dtype)
    write_transformer(tmp_path / "out", base, FOLDED)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in base.iterdir() if "fp16" not in path.name and path.suffix != ".bin"
    )
    found = {
        key: tensor for path in weight_files(tmp_path / "out") for key, tensor in load_file(path).items()
    }
    assert torch.equal(found["first.weight"], torch.ones(2, 2))
    assert found["second.weight"].dtype == dtype == stored_dtype(tmp_path / "out")
    assert torch.equal(found["second.weight"], (torch.full((4, 3), 0.5) + B @ A).to(dtype))


def test_a_layer_that_is_not_there(tmp_path: Path) -> None:
    base = sharded(tmp_path / "base", torch.float32)
    with pytest.raises(DataError, match=r"has no third\.weight"):
        write_transformer(tmp_path / "out", base, Folded({"third": (A, B)}, 2, 2, 0.0))


def test_a_format_that_nothing_is_merged_into(tmp_path: Path) -> None:
    base = sharded(tmp_path / "base", torch.float64)
    with pytest.raises(DataError, match="float64"):
        write_transformer(tmp_path / "out", base, FOLDED)

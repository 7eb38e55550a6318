"""Which files of a component's folder are its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rtdmd_cli.engine.backbones.layout import weight_names
from rtdmd_cli.engine.export.merged import _copied
from rtdmd_cli.engine.rewards.fetch import _component_is_whole
from rtdmd_cli.engine.storage.components import NAMES, weight_files
from tests.tiny_flux import tiny_folder


def add_index(folder: Path, name: str, *parts: str) -> None:
    weights = {f"layer.{i}.weight": part for i, part in enumerate(parts)}
    (folder / name).write_text(json.dumps({"weight_map": weights}))


def test_an_index_names_the_files(tmp_path: Path) -> None:
    assert weight_files(tmp_path) == []
    for name in NAMES:
        (tmp_path / name).touch()
        assert weight_files(tmp_path) == [tmp_path / name]
        parts = [name.replace(".", f"-0000{i}-of-00002.", 1) for i in (1, 2)]
        add_index(tmp_path, f"{name}.index.json", *parts[::-1])
        assert weight_files(tmp_path) == [tmp_path / part for part in parts]
        (tmp_path / f"{name}.index.json").unlink()
        (tmp_path / name).unlink()


@pytest.mark.parametrize("sharded", [False, True])
def test_the_same_weights_in_another_format_are_not_the_component(tmp_path: Path, sharded: bool) -> None:
    """As of a repository from which only the fp16 variant was fetched."""
    whole = Path(shutil.copytree(tiny_folder("sd3") / "text_encoder_3", tmp_path / "whole"))
    assert _component_is_whole(whole) and len(weight_names(whole)) > 5
    only = Path(shutil.copytree(whole, tmp_path / "only"))
    twin = "model.fp16-00001-of-00001.safetensors" if sharded else "model.fp16.safetensors"
    (only / "model.safetensors").rename(only / twin)
    if sharded:
        add_index(only, "model.safetensors.index.fp16.json", twin)
    assert not _component_is_whole(only)
    with pytest.raises(FileNotFoundError, match=r"only holds no .* and no model\.safetensors"):
        weight_names(only)
    both = sorted(path.name for path in whole.iterdir())
    for path in only.iterdir():
        shutil.copy(path, whole)
    assert [path.name for path in _copied(whole)] == both
    assert weight_files(whole) == [whole / "model.safetensors"]

"""An exported folder is read as it was written, and as nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.engine.storage.exported import (
    FORMAT,
    MANIFEST,
    VERSION,
    file_sha256,
    is_exported,
    read_exported,
)
from rtdmd_cli.errors import DataError

FILES = (
    "model_index.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "comfyui/lora.safetensors",
    "samples.png",
)


def described(folder: Path, merged: bool) -> dict[str, object]:
    preset = load_preset("shapes-4step", environ={}).preset.model_dump(mode="json")
    return {
        "format": FORMAT,
        "version": VERSION,
        "preset": {key: preset[key] for key in ("name", "model", "sampler")},
        "lora": None if merged else "comfyui/lora.safetensors",
        "prefix": "transformer",
        "merged": merged,
        "stock_schedule": False,
        "base": {"hash": "0" * 64},
        "trained_on": [],
        "files": {name: {"size": 1, "sha256": file_sha256(folder / name)} for name in FILES},
    }


@pytest.fixture(params=[True, False], ids=["merged", "lora"])
def export(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    for number, name in enumerate(FILES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes([number]) * 100)
    (tmp_path / MANIFEST).write_text(json.dumps(described(tmp_path, request.param)))
    return tmp_path


def test_a_whole_one_is_read(export: Path) -> None:
    assert is_exported(export)
    found = read_exported(export)
    assert (found.lora is None) == found.merged
    (export / "README.md").write_text("a card")  # and what is not loaded may go
    (export / "samples.png").unlink()
    assert read_exported(export) == found


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_what_is_loaded_is_found(export: Path, name: str) -> None:
    merged = read_exported(export).merged
    flip(export / name)
    if name == "samples.png" or (name == "comfyui/lora.safetensors") == merged:
        assert read_exported(export).merged == merged
        return
    with pytest.raises(DataError, match=rf"{name} is damaged: its sha256") as caught:
        read_exported(export)
    assert caught.value.exit_code == 4


def add(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text("{}") and None


def swap(folder: Path) -> None:
    """Another model's text encoder."""
    (folder / "text_encoder/model.safetensors").write_bytes(b"another")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: (folder / FILES[2]).unlink(), "is missing"),
        (swap, "text_encoder/model.safetensors is damaged"),
        (add("transformer/diffusion_pytorch_model.safetensors.index.json"), "is not of this export"),
        (add("text_encoder/model.fp16.safetensors"), "is not of this export"),
        (lambda folder: (folder / "transformer/x.bin").symlink_to("/dev/zero"), "is not of this export"),
    ],
)
def test_a_pipeline_is_the_one_that_was_written(
    export: Path, change: Callable[[Path], None], reason: str
) -> None:
    if read_exported(export).merged:
        change(export)
        with pytest.raises(DataError, match=reason):
            read_exported(export)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_its_description_holds(export: Path, data: st.DataObject) -> None:
    """Each field may be anything: it is read, or refused as damaged."""
    text = (export / MANIFEST).read_text()
    body = json.loads(text)
    try:
        for key in data.draw(
            st.sets(st.sampled_from(sorted(body.keys() - {"format"})), min_size=1, max_size=2)
        ):
            body[key] = data.draw(JSON)
        (export / MANIFEST).write_text(json.dumps(body))
        try:
            read_exported(export)
        except DataError as error:
            assert str(export) in error.message and error.hint
    finally:
        (export / MANIFEST).write_text(text)


@pytest.mark.parametrize("files", [[], "", 7, None], ids=repr)
@pytest.mark.parametrize("lora", [False, 0, [], {}], ids=repr)
def test_a_lora_without_a_name(export: Path, lora: object, files: object) -> None:
    """Found by the test above: a list of files was asked for the entry of `false`."""
    body = json.loads((export / MANIFEST).read_text()) | {"lora": lora, "files": files}
    (export / MANIFEST).write_text(json.dumps(body))
    with pytest.raises(DataError, match="is damaged: TypeError"):
        read_exported(export)

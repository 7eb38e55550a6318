"""The same content gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from rtdmd_cli.engine.storage.tensor_files import tensor_bytes, write_tensors

TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}
METADATA = {f"key {number}": f'text {number}, "ü", \\ and \t\x01\x7f' for number in range(20)}


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    """Of twenty keys the library alone gives another order each time."""
    turned = dict(reversed(METADATA.items()))
    data = tensor_bytes(TENSORS, METADATA)
    assert safetensors.torch.save(TENSORS, METADATA) != data, (
        "the library sorts by itself now: remove this module"
    )
    for number, metadata in enumerate((METADATA, turned)):
        write_tensors(tmp_path / str(number), TENSORS, metadata)
        assert (tmp_path / str(number)).read_bytes() == tensor_bytes(TENSORS, metadata) == data


def test_tensors_and_metadata_are_as_given(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", TENSORS, METADATA)
    with safe_open(tmp_path / "file", framework="pt") as found:
        assert found.metadata() == METADATA
        assert all(torch.equal(found.get_tensor(name), tensor) for name, tensor in TENSORS.items())
    assert len(tensor_bytes(TENSORS, METADATA)) == len(safetensors.torch.save(TENSORS, METADATA))


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_little_metadata_is_as_the_library_writes_it(metadata: dict[str, str]) -> None:
    assert tensor_bytes(TENSORS, metadata) == safetensors.torch.save(TENSORS, metadata)

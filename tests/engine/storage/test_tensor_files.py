"""The same content gives the same bytes."""

from __future__ import annotations

import errno
import resource
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from rtdmd_cli.engine.storage.files import remove_leftovers
from rtdmd_cli.engine.storage.tensor_files import tensor_bytes, write_tensors
from rtdmd_cli.errors import EnvironmentFailure

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


def test_a_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    """The library alone makes it readable for its owner only."""
    write_tensors(tmp_path / "file", TENSORS, METADATA)
    (tmp_path / "other").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", TENSORS, METADATA)
    before, limits = (tmp_path / "file").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        with pytest.raises(EnvironmentFailure, match="Cannot write .*/file: file too large"):
            write_tensors(tmp_path / "file", {"big": torch.zeros(1_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    assert (tmp_path / "file").read_bytes() == before


def test_what_a_kill_leaves_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = tmp_path / "killed"

    def stopped(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.with_name(".tmpX").write_bytes(b"half")  # the library's own name
        shutil.copytree(path.parent, killed / path.parent.name)
        raise OSError(errno.EIO, "failed")

    monkeypatch.setattr(safetensors.torch, "save_file", stopped)
    with pytest.raises(EnvironmentFailure):
        write_tensors(tmp_path / "file", TENSORS, METADATA)
    assert len(remove_leftovers(killed, name="file", held=True)) == 1
    assert list(killed.iterdir()) == []

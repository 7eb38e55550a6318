"""Safetensors files whose bytes depend on tensors and metadata alone.

The library writes the metadata in another order each time (safetensors 0.8 keeps it in a hash map with a random key), so
that two files of the same content have other sums. Here the keys are sorted after it has written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from rtdmd_cli.engine.storage import files, strict_json
from rtdmd_cli.engine.storage.disk_errors import os_errors

_LENGTH = 8  # bytes in front of the header that say how long it is
_METADATA = "__metadata__"
_READ_AND_WRITE = 0o666  # what of a new folder's permissions is a file's


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A file's bytes. tensors: contiguous, of any device, none sharing its memory with another (else ValueError)."""
    data = safetensors.torch.save(dict(tensors), metadata=dict(metadata))
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    return data[:_LENGTH] + _in_order(data[_LENGTH:end]) + data[end:]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Make the bytes of `tensor_bytes` the content of `path`, whole or not at all, without a copy in memory.

    The library writes a file under a name of its own, readable for its owner alone (safetensors 0.8), and renames it. Hence a
    folder of ours around it: a killed process's leftovers are known by their name, and the file gets usual permissions.
    EnvironmentFailure where the disk refuses.
    """
    with files.building(path) as folder:
        file = folder / path.name
        with os_errors(path):
            safetensors.torch.save_file(dict(tensors), file, metadata=dict(metadata))
            file.chmod(folder.stat().st_mode & _READ_AND_WRITE)
            _sort_metadata(file)
            files.disk.flush_path(file)
            files.disk.replace(file, path)
            files.disk.flush_path(path.parent)
        files.remove_folder(folder)


def _sort_metadata(path: Path) -> None:
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        header = _in_order(file.read(length))
        file.seek(_LENGTH)
        file.write(header)


def _in_order(header: bytes) -> bytes:
    """The header with its metadata by their keys, as long as before: spaces may fill its end."""
    described = strict_json.parse(header)
    if _METADATA not in described:  # where there is none, the library leaves it out
        return header
    described[_METADATA] = dict(sorted(described[_METADATA].items()))
    ordered = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(ordered) <= len(header), "the same content is as long in any order"
    return ordered.ljust(len(header))

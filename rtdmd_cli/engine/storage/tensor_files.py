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

from rtdmd_cli.engine.storage import strict_json

_LENGTH = 8  # bytes in front of the header that say how long it is
_METADATA = "__metadata__"


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A file's bytes. tensors: contiguous, of any device, none sharing its memory with another (else ValueError)."""
    data = safetensors.torch.save(dict(tensors), metadata=dict(metadata))
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    return data[:_LENGTH] + _in_order(data[_LENGTH:end]) + data[end:]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """As `tensor_bytes`, into a file that `files.write_with` gives, without a copy in memory.

    OSError or SafetensorError where the disk refuses.
    """
    safetensors.torch.save_file(dict(tensors), path, metadata=dict(metadata))
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

"""LoRA files that are whole by their sum, and are none all the same."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rtdmd_cli.engine.storage.lora_files import lora_tensors, read_lora, write_lora
from rtdmd_cli.errors import DataError

KEY_A, KEY_B = "transformer.0.lora_A.weight", "transformer.0.lora_B.weight"
MODEL = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))


def good() -> dict[str, Tensor]:
    return lora_tensors({"0": (torch.ones(2, 3), torch.ones(4, 2))}, "transformer")


def read(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    write_lora(folder / "lora.safetensors", tensors, {})
    return read_lora(folder / "lora.safetensors", "transformer", MODEL)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        found = read(tmp_path, {key: tensor.to(dtype) for key, tensor in good().items()})
        assert found.keys() == {KEY_A, KEY_B} and found[KEY_A].dtype == dtype


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({KEY_A: torch.ones(2, 3, dtype=torch.int32)}, "no usable weights: .*lora_A.weight is torch.int32"),
        ({KEY_B: torch.ones(4, 2, dtype=torch.complex64)}, "no usable weights: .*is torch.complex64"),
        ({KEY_B: torch.full((4, 2), math.nan)}, "no usable weights: .*lora_B"),
        ({KEY_A: torch.full((2, 3), math.inf)}, "no usable weights: .*lora_A"),
        (
            {KEY_A: torch.ones(3, 3)},
            r"doesn't fit the model: .*lora_A.weight \[3, 3\]",
        ),  # another rank than B's
        ({KEY_A: torch.ones(2, 4)}, "doesn't fit the model"),
        ({KEY_A: torch.ones(6)}, "doesn't fit the model"),
        ({KEY_A: torch.ones(())}, "doesn't fit the model"),
        ({KEY_A: None}, "doesn't fit the model"),
        ({KEY_A: None, KEY_B: None}, "holds no weights"),
        ({"transformer.2.lora_A.weight": torch.ones(2, 3)}, "doesn't fit the model"),
        ({"other.0.lora_A.weight": torch.ones(2, 3)}, "doesn't fit the model"),
        ({"transformer.0.alpha": torch.ones(())}, "doesn't fit the model"),
    ],
)
def test_what_is_no_lora_of_the_model_is_refused(
    tmp_path: Path, changes: dict[str, Tensor | None], reason: str
) -> None:
    tensors = {key: tensor for key, tensor in (good() | changes).items() if tensor is not None}
    with pytest.raises(DataError, match=reason):
        read(tmp_path, tensors)


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    for data in (
        b"",
        b"x" * 7,
        (1 << 40).to_bytes(8, "little") + b"{}",
        b"\x80\x04K\x01.",
        b"PK\x03\x04" * 9,
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match="can't be read"):
            read_lora(path, "transformer", MODEL)

"""While a model loads, the machine's faults are told from damaged files."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rtdmd_cli.cli.failures import explain
from rtdmd_cli.engine.backbones.families import FAMILIES
from rtdmd_cli.engine.backbones.layout import readable_model
from rtdmd_cli.errors import DataError, is_out_of_memory

LAYOUT = FAMILIES["sd3"].module().LAYOUT
FAULTS = {
    "disk": OSError(errno.EIO, "Input/output error", "model.safetensors"),
    "open files": OSError(errno.EMFILE, "Too many open files", "model.safetensors"),
    "memory of the system": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "memory of the host": RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    ),
    "memory of a card": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "a library's memory": ImportError("libx.so: failed to map segment from shared object"),
    "memory of Python": MemoryError(),
    "a torchvision of another torch": RuntimeError("operator torchvision::nms does not exist"),
    "a driver": RuntimeError("CUDA driver error: device not ready"),
    "a card": torch.AcceleratorError(
        "CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA"
    ),
}


def load(folder: Path, fault: Exception | None) -> None:
    """As the libraries do: an error of their own over what happened."""
    with readable_model(LAYOUT, folder):
        raise RuntimeError(
            "Failed to import x because of the following error (look up to see its traceback):"
        ) from fault


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_machine_is_no_damaged_model(name: str, tmp_path: Path) -> None:
    for raised in (FAULTS[name], None):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is asked below
            if raised is None:
                load(tmp_path, FAULTS[name])
            else:
                with readable_model(LAYOUT, tmp_path):
                    raise raised
        told = explain(caught.value)
        assert told.exit_code == 3 and "can't be loaded" not in told.message and told.hint, told


def test_other_errors_are_of_the_files(tmp_path: Path) -> None:
    for fault in (None, ValueError("bad header"), OSError(errno.ENOENT, "No such file", "config.json")):
        with pytest.raises(DataError, match="can't be loaded"):
            load(tmp_path, fault)


def test_a_disk_that_runs_no_programs_is_no_full_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader has the same words for both."""
    library = tmp_path / "kernel.so"
    library.touch()
    error = ImportError(f"{library}: failed to map segment from shared object")
    assert is_out_of_memory(error)
    flags = SimpleNamespace(f_flag=os.ST_NOEXEC | os.ST_NODEV)
    monkeypatch.setattr(os, "statvfs", lambda path: flags)
    told = explain(error)
    assert not is_out_of_memory(error) and told.exit_code == 3
    assert "noexec" in told.message and "TMPDIR" in told.hint


def test_a_torchvision_of_another_torch_is_named() -> None:
    """What transformers raises over it names a class of its own alone."""
    try:
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as inner:
            raise ModuleNotFoundError("Could not import module 'AutoImageProcessor'.") from inner
    except ModuleNotFoundError as error:
        told = explain(error)
    assert told.exit_code == 3 and told.message.endswith("fit: operator torchvision::nms does not exist.")
    assert "pip uninstall torchvision" in told.hint
    old = ImportError("Found an incompatible version of torchao. Found version 0.10.0")
    assert "pip install -U torchao" in explain(old).hint
    for other in (
        RuntimeError("something else"),
        ModuleNotFoundError("No module named 'torchvision'", name="torchvision"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/home/me/torchvision/a.txt"),
    ):
        assert explain(other).exit_code == 1 and "doesn't fit" not in explain(other).message


@pytest.mark.parametrize(
    "error",
    [
        torch.distributed.DistBackendError("NCCL error in: NCCLUtils.cpp:268, unhandled system error"),
        RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:1, unhandled system error, NCCL version 2.28"),
    ],
)
def test_processes_that_cannot_reach_each_other(error: Exception) -> None:
    """Also where an error of another kind came of it. A card that fails is told of as one."""
    told = explain(error)
    assert told.exit_code == 3 and told.message.startswith(
        "The processes can't reach each other: NCCL error in"
    )
    assert "docker run --shm-size=1g" in told.hint and "--ipc=host" in told.hint
    try:
        raise KeyError("after it") from error
    except KeyError as later:
        assert explain(later) == told
    assert "The GPU has failed" in explain(RuntimeError("CUDA error: unspecified launch failure")).message

"""Each check against what it is to find: made-up systems in files and on the PATH, the real libraries."""

import shutil
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from peft import import_utils

from rtdmd_cli.engine.compute.host import GIB, host_memory
from rtdmd_cli.engine.doctor import device, presets, run, software, storage
from rtdmd_cli.engine.doctor.check import Check, examined

PYPROJECT = tomllib.loads(Path(__file__).parents[3].joinpath("pyproject.toml").read_text("utf-8"))["project"]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


def test_python_and_extras_are_those_of_the_package() -> None:
    (low, high) = ((int(a), int(b)) for a, b in (v.split(".") for v in ("3.11", "3.14")))
    assert PYPROJECT["requires-python"] == ">=3.11,<3.14" and (low, high) == software.PYTHON
    stated = {name: lines for name, lines in PYPROJECT["optional-dependencies"].items() if name != "dev"}
    assert {name: tuple(Requirement(line).name for line in lines) for name, lines in stated.items()} == (
        software.EXTRAS
    )


def test_a_library_that_is_missing_or_too_old_is_named() -> None:
    wanted = ["torch>=2.13,<3", "torch>=99", "no-such-library>=1", 'also-not-here; extra == "ocr"']
    assert software.unmet([Requirement(line) for line in wanted]) == ["torch>=99", "no-such-library>=1"]


def test_unmet_libraries_fail_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "_stated", lambda: [Requirement("torch>=99")])
    found = software.libraries()
    assert found.state == "FAIL" and found.fix == "pip install --upgrade 'torch>=99'"


def write_system(folder: Path, bound: str = "max") -> tuple[Path, Path]:
    meminfo = folder / "meminfo"
    meminfo.write_text("MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:   12582912 kB\n")
    (folder / "memory.max").write_text(f"{bound}\n")
    (folder / "memory.current").write_text(f"{3 * GIB}\n")
    return meminfo, folder


def test_the_memory_of_the_host_and_of_a_container(tmp_path: Path) -> None:
    free = host_memory(*write_system(tmp_path))
    assert free and (free.total, free.available, free.limited) == (16 * GIB, 12 * GIB, False)
    bound = host_memory(*write_system(tmp_path, str(8 * GIB)))
    assert bound and (bound.total, bound.available, bound.limited) == (8 * GIB, 5 * GIB, True)
    assert host_memory(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("bound", "used", "reclaimable"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_files_that_were_read_are_not_memory_in_use(
    bound: str, used: str, reclaimable: str, tmp_path: Path
) -> None:
    """In both versions of cgroups; after a download a container's memory is full of the file."""
    meminfo, cgroup = write_system(tmp_path)
    (cgroup / bound).parent.mkdir(exist_ok=True)
    (cgroup / bound).write_text(f"{8 * GIB}\n")
    (cgroup / used).write_text(f"{7 * GIB}\n")
    statistics = (cgroup / bound).parent / "memory.stat"
    statistics.write_text(f"anon {GIB}\nactive_file {GIB}\n{reclaimable} {5 * GIB}\n")
    found = host_memory(meminfo, cgroup)
    assert found and (found.total, found.available, found.limited) == (8 * GIB, 6 * GIB, True)
    statistics.unlink()
    unknown = host_memory(meminfo, cgroup)
    assert unknown and unknown.available == GIB
    (cgroup / bound).write_text("9223372036854771712\n")  # no bound, in version 1
    free = host_memory(meminfo, cgroup)
    assert free and (free.total, free.limited) == (16 * GIB, False)


@pytest.mark.parametrize(("free", "state"), [(1, "FAIL"), (9, "WARN"), (20, "PASS")])
def test_too_little_memory(free: int, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = storage.host_memory()
    assert memory
    monkeypatch.setattr(storage, "host_memory", lambda: type(memory)(24 * GIB, free * GIB))
    assert storage.memory().state == state


@NO_GPU
def test_a_card_that_torch_cannot_use_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 4090, 570.86'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    device.driver.cache_clear()
    try:
        found = device.gpu()
    finally:
        device.driver.cache_clear()
    assert found.state == "FAIL" and "RTX 4090 (driver 570.86)" in found.found and "torch" in found.fix


@NO_GPU
@pytest.mark.parametrize("value", ["", "-1", "1"])
def test_a_card_that_a_variable_hides_is_told(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    card = {"name": "NVIDIA GeForce RTX 4090", "version": "570.86", "count": "1"}
    monkeypatch.setattr(device, "driver", lambda: card)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    found = device.gpu()
    assert found.state == "FAIL" and found.fix == "unset CUDA_VISIBLE_DEVICES"
    assert f"CUDA_VISIBLE_DEVICES={value!r} hides" in found.found and "RTX 4090" in found.found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "built for CUDA 13.0" in device.gpu().found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    monkeypatch.setattr(torch.version, "cuda", None)  # then the variable is the lesser fault
    assert "built without CUDA" in device.gpu().found


@NO_GPU
def test_without_a_card_it_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "driver", dict)
    assert device.gpu().state == "WARN" and device.formats().facts["fp8"] is False


@pytest.mark.parametrize(
    ("cards", "mib", "state"),
    [(1, 64, "PASS"), (2, 64, "WARN"), (2, None, "WARN"), (2, 1024, "PASS")],
)
def test_shared_memory_for_several_cards(
    cards: int, mib: int | None, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 MiB are a container's unless it is told otherwise."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(device, "SHARED", tmp_path if mib else tmp_path / "absent")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=(mib or 0) * 2**20))
    found = device.shared()
    assert found.state == state == run.CHECKS["shared"]().state
    assert ("--shm-size=1g" in found.fix and "--ipc=host" in found.fix) == (state == "WARN")


def test_a_compiler_is_found_or_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    assert device.compiler().state == "WARN"
    for name in ("g++", "gcc"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert device.compiler().state == "PASS"


def test_quantised_layers_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    found = device.quantisation()
    assert found.state == "PASS" and 0 < found.facts["int8"] < found.facts["nf4"]
    monkeypatch.setattr(device, "NEAR", {"int8": 0.03, "nf4": 0.01})
    assert device.quantisation().state == "FAIL"


def test_a_folder_that_cannot_be_written_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "a/b"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_bytes(bytes(1000))
    assert storage.cache().state == "PASS" and storage.cache().facts["size_gib"] == 0
    monkeypatch.setattr(storage.os, "access", lambda path, mode: False)
    found = storage.cache()
    assert found.state == "FAIL" and "can't be written" in found.found and "RTDMD_CACHE" in found.fix


def test_a_full_disk_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = type(storage.shutil.disk_usage(tmp_path))
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path))
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage(GIB, GIB, GIB))
    assert storage.cache().state == "FAIL"
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage(9 * GIB, 0, 9 * GIB))
    assert storage.cache().state == "PASS" and storage.models().state == "WARN"


def test_the_token_is_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "get_token", lambda: "hf_abcdefghijkl")
    monkeypatch.setattr(storage.constants, "HF_HUB_OFFLINE", False)
    found = storage.hub()
    assert found.state == "PASS" and "hf_" not in f"{found}"
    monkeypatch.setattr(storage, "get_token", lambda: None)
    assert storage.hub().state == "WARN" and storage.hub().fix.endswith("hf auth login")


def test_a_check_that_breaks_is_a_failure_and_the_others_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Check:
        raise subprocess.SubprocessError("no such driver\nat all")

    found = examined("gpu", broken)
    assert found.state == "FAIL" and found.found == "SubprocessError: no such driver"
    home = Check("home", "PASS", f"{Path.home()}/models", facts={"path": f"{Path.home()}/models"})
    monkeypatch.setattr(run, "CHECKS", {"gpu": broken, "home": lambda: home})
    lines = list(run.examine())
    assert [line.state for line in lines] == ["FAIL", "PASS"]
    assert lines[1].found == "~/models" == lines[1].facts["path"]


@pytest.mark.parametrize(("card", "state"), [(None, "WARN"), (6.0, "WARN"), (16.0, "PASS"), (80.0, "PASS")])
def test_presets_that_fit_the_card(card: float | None, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "card_memory", lambda: card)
    found = presets.fitting()
    assert found.state == state
    told = {name for name, fact in found.facts.items() if fact["fits"]}
    assert told == {name for name, own in presets.stated().items() if card and own.peak <= 0.92 * card}
    assert ("sd3-4step-16gb" in told) == (card in (16.0, 80.0))
    assert ("too large" in found.found) == (card in (6.0, 16.0))
    assert ("--fit --vram 6" in found.fix) == (card == 6.0)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("torchvision", "raise RuntimeError('operator torchvision::nms does not exist')"),
        ("torchao", ""),
    ],
)
def test_companions_that_do_not_fit(
    name: str, body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older torchao is found by its version, a torchvision of another torch by its import."""
    assert software.companions().state == "PASS"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(body)
    about = tmp_path / f"{name}-0.10.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.10.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    import_utils.is_torchao_available.cache_clear()
    found = software.companions()
    import_utils.is_torchao_available.cache_clear()
    assert found.state == "FAIL" and found.found.startswith(f"{name} 0.10.0 doesn't fit: ")
    assert found.fix.endswith(f"pip install -U {name}, or pip uninstall {name}")

"""The driver is asked what it can, as torch says nothing of one that is too old for it."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rtdmd_cli.cli.checking import device_of, require_device
from rtdmd_cli.engine.compute import driver
from rtdmd_cli.engine.compute.device import resolve_device
from rtdmd_cli.errors import EnvironmentFailure


def stub(version: int, cards: int = 1) -> Any:
    """As libcuda."""

    def put(value: int) -> Any:
        def ask(place: Any) -> int:
            place._obj.value = value
            return 0

        return ask

    return SimpleNamespace(
        cuInit=lambda flags: 0, cuDeviceGetCount=put(cards), cuDriverGetVersion=put(version)
    )


def test_a_driver_that_is_too_old_for_torch_is_no_reason_to_train_on_the_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "built_for", lambda: (13, 0))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: stub(12080))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for ask in (device_of, resolve_device):
        with pytest.raises(EnvironmentFailure, match=r"does CUDA 12\.8, and this torch is built for 13\.0"):
            ask("auto")
    with pytest.raises(EnvironmentFailure, match="too old"):
        require_device("cuda")
    assert resolve_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("built", "version", "cards", "there"),
    [((13, 2), 13000, 1, True), ((13, 0), 14010, 2, True), ((), 0, 1, True), ((13, 0), 12080, 0, False)],
)
def test_what_the_driver_counts(
    built: tuple[int, ...], version: int, cards: int, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the same major version will do; cards that a variable hides are none."""
    monkeypatch.setattr(driver, "built_for", lambda: built)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: stub(version, cards))
    assert driver.cuda_at_hand() is there


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_card_that_torch_cannot_use_is_not_left_idle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reason, as a driver whose module is of another version; one that is hidden is left on purpose."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(driver, "built_for", lambda: (13, 0))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: stub(13020))
    with pytest.raises(
        EnvironmentFailure, match=r"does CUDA 13\.2, counts a card, .* built for 13\.0, can't"
    ) as refused:
        resolve_device(name)
    assert refused.value.exit_code == 3 and "--device cpu" in refused.value.hint
    monkeypatch.setattr(ctypes, "CDLL", lambda name: stub(13020, cards=0))  # CUDA_VISIBLE_DEVICES=""
    if name == "auto":
        assert resolve_device(name).type == "cpu"


def test_what_torch_is_built_for_is_read_without_it() -> None:
    """As torch itself says."""
    stated = torch.version.cuda
    expected = () if torch.version.hip else None if stated is None else tuple(map(int, stated.split(".")[:2]))
    assert driver.built_for() == expected

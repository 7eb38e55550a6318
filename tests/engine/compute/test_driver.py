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
    assert not torch.cuda.is_available()
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


def test_this_torch_is_built_for_no_card() -> None:
    assert driver.built_for() is None and torch.version.cuda is None

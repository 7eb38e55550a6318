"""Every family and every shipped base model has its row."""

from __future__ import annotations

import pytest

from rtdmd_cli.config.loader import list_presets, load_preset
from rtdmd_cli.engine.backbones import base as backbones
from rtdmd_cli.engine.export.card import is_hub_id, local_name, public_name
from rtdmd_cli.engine.export.families import FAMILIES, UNKNOWN, generator_base, generator_revision, licence_of

PRESETS = [info.name for info in list_presets()]


def test_every_family_can_be_exported() -> None:
    assert FAMILIES.keys() == backbones.FAMILIES.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_the_licence_of_every_shipped_base_is_known(name: str) -> None:
    preset = load_preset(name, environ={}).preset
    licence = licence_of(generator_base(preset))
    assert licence is not UNKNOWN
    assert (licence.id == "other") == (licence.name is not None) == (licence.link is not None)


def test_the_generators_own_base_counts() -> None:
    preset = load_preset("flux2-klein-9b-4step", ["model.generator_revision=abc"], environ={}).preset
    assert generator_base(preset) == "black-forest-labs/FLUX.2-klein-9B"
    assert generator_revision(preset) == "abc" and preset.model.revision is None
    assert licence_of(generator_base(preset)).text == "FLUX Non-Commercial License"
    shared = load_preset("flux2-klein-9b-4step", ["model.generator_init=teacher"], environ={}).preset
    assert generator_base(shared) == "black-forest-labs/FLUX.2-klein-base-9B"


def test_paths_of_this_machine_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/zebulon")
    monkeypatch.setenv("LOGNAME", "zebulon")
    assert local_name("/home/zebulon/models/mine") == "~/models/mine"
    assert public_name("/home/zebulon/models/mine") == "mine"
    for kept in ("builtin:shapes", "zebulon/model"):
        assert public_name(kept) == local_name(kept) == kept or kept.startswith("builtin")
    assert is_hub_id("zebulon/model")
    assert not any(map(is_hub_id, ("builtin:shapes", "/a/b", "./b", "~/b", "a/b/c", "model")))

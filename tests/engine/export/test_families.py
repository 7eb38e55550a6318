"""Every family and every shipped base model has its row."""

from __future__ import annotations

import pytest

from rtdmd_cli.config.loader import load_preset, preset_names
from rtdmd_cli.engine.backbones import families as backbones
from rtdmd_cli.engine.export.families import FAMILIES, generator_base, generator_revision, licence_of
from rtdmd_cli.engine.export.names import is_hub_id, local_name, place_of, public_name
from rtdmd_cli.engine.families.facts import UNKNOWN

PRESETS = preset_names()


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
    assert place_of("/home/zebulon/models/mine").expression == 'os.path.expanduser("~/models/mine")'
    assert is_hub_id("zebulon/model") and place_of("zebulon/model").expression == '"zebulon/model"'
    assert not any(map(is_hub_id, ("builtin:shapes", "/a/b", "./b", "~/b", "a/b/c", "model")))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_loader_lists_every_file_that_its_nodes_name(family: str) -> None:
    """And no word of their other settings."""
    for loader in FAMILIES[family].comfy.values():
        values = {*loader.model[1].values(), *loader.clip[1].values(), loader.vae or ""}
        named = {value for value in values if value.endswith(".safetensors")}
        assert {file.name for file in loader.files} == named and values - named <= {
            "",
            "default",
            "flux",
            "flux2",
            "lumina2",
            "qwen_image",
        }
        assert {file.folder for file in loader.files} <= {
            "checkpoints",
            "diffusion_models",
            "text_encoders",
            "vae",
        }
        assert all(file.source.count("/") == 1 and file.what for file in loader.files)
        assert loader.needs == ("0.10.0" if family == "flux2" else "0.7.0")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_text_encoder_in_8_bits_has_its_full_one_named(family: str) -> None:
    """Of the same model: the name without what says how it is stored."""
    for loader in FAMILIES[family].comfy.values():
        names = [file.name for file in loader.files if file.what == "text encoder" and "_fp8" in file.name]
        full = [f"`{name.partition('_fp8')[0]}.safetensors`" for name in names]
        assert all(name in loader.text for name in full) and ("8 bits" in loader.text) is bool(full)

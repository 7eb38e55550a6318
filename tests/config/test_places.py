"""Paths of a preset from whatever folder a command is started in."""

from __future__ import annotations

from pathlib import Path

import pytest

from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.config.places import located, shown_from, with_whole_paths

SETTINGS = ["model.path=base", "distill.prompts=train.txt", "tune_reward.reward_paths=[pickscore=scorer]"]


def test_a_run_finds_its_files_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("base", "scorer"):
        (tmp_path / name).mkdir()
    (tmp_path / "train.txt").write_text("a cat\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    resolved = load_preset("sd3-4step", [*SETTINGS, "model.components=~/base"], environ={})
    found = with_whole_paths(resolved)
    model, tune = found.preset.model, found.preset.tune_reward
    assert (model.path, model.components) == (str(tmp_path / "base"),) * 2
    assert found.preset.distill.prompts == str(tmp_path / "train.txt")
    assert tune.reward_paths == (f"pickscore={tmp_path / 'scorer'}",)
    monkeypatch.chdir("/")
    assert located(found.preset) == found.preset and found.sha256 != resolved.sha256


def test_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub ids, sets, the built-in world, and what is not there."""
    monkeypatch.chdir(tmp_path)
    for name in ("sd3-4step", "shapes-4step", "flux2-klein-4b-4step"):
        resolved = load_preset(name, ["tune_reward.eval_prompts=none/such.txt"], environ={})
        assert with_whole_paths(resolved) == resolved


def test_what_lies_inside_a_run_is_shown_from_there(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    assert shown_from(run, str(run / "base" / "sd3")) == "base/sd3"
    for elsewhere in (str(tmp_path / "runs" / "mine-2"), str(run), "builtin:shapes", "owner/model"):
        assert shown_from(run, elsewhere) == elsewhere

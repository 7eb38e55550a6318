"""`rtdmd fetch` with the hub switched off: what is cached, what is missing, what is built in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rtdmd_cli.cli import failures
from rtdmd_cli.cli.app import app
from rtdmd_cli.engine.families.table import MODELS
from rtdmd_cli.engine.rewards.fetch import is_whole
from rtdmd_cli.engine.rewards.registry import REWARDS
from tests.tiny_hub import offline_hub, publish
from tests.tiny_models import sd3_folder

SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return offline_hub(tmp_path / "hub", monkeypatch)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["fetch", *arguments])


def publish_model(root: Path, repository: str) -> Path:
    """A whole pipeline as the hub's cache holds it."""
    folder = root / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("b" * 40)
    shutil.copytree(sd3_folder(), snapshot)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("b" * 40)
    return snapshot


def test_a_model_that_is_cached(hub: Path) -> None:
    snapshot = publish_model(hub, SD3)
    for name in ("sd3-4step", SD3):
        result = call(name, "--json")
        assert result.exit_code == 0 and "already here" in result.stderr
        (found,) = json.loads(result.stdout)
        assert (found["source"], found["path"], found["downloaded"]) == (SD3, str(snapshot), False)
        assert found["licence"] == MODELS[SD3.lower()].licence.text and found["licence"] in result.stderr
        assert found["size"] == sum(path.stat().st_size for path in snapshot.rglob("*") if path.is_file())
    assert call(SD3, "--quiet").stderr == ""


@pytest.mark.parametrize("file", ["vae/diffusion_pytorch_model.safetensors", "model_index.json"])
def test_a_model_that_is_cached_in_part_or_not_at_all(hub: Path, file: str) -> None:
    absent = failures.explain(call("sd3-4step").exception)
    assert absent.exit_code == 3 and SD3 in absent.message and "HF_HUB_OFFLINE" in absent.hint
    (publish_model(hub, SD3) / file).unlink()
    partial = failures.explain(call("sd3-4step").exception)
    assert partial.exit_code == 3 and SD3 in partial.message and "network" in partial.hint


def test_a_folder_with_weights_in_parts(tmp_path: Path) -> None:
    folder = shutil.copytree(sd3_folder(), tmp_path / "model")
    assert is_whole(folder)
    index = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "two.safetensors"}})
    )
    assert not is_whole(folder)
    (folder / "transformer/two.safetensors").write_bytes(b"")
    assert is_whole(folder)
    shutil.rmtree(folder / "tokenizer_2")
    assert not is_whole(folder)


def test_a_reward_that_is_cached_and_one_that_is_not(hub: Path, tmp_path: Path) -> None:
    (need,) = REWARDS["clipscore"].needs
    absent = failures.explain(call("clipscore").exception)
    assert absent.exit_code == 3 and need.source in absent.message
    names = ("config.json", "model.safetensors", "tokenizer.json", "vocab.json", "merges.txt")
    for name in (*names, "preprocessor_config.json"):
        (tmp_path / name).write_bytes(b"{}")
    publish(hub, need.source, *(tmp_path / name for name in (*names, "preprocessor_config.json")))
    result = call("clipscore", "--json")
    assert result.exit_code == 0 and "MIT" in result.stderr
    (found,) = json.loads(result.stdout)
    assert (found["kind"], found["size"], found["downloaded"]) == ("reward", need.size, False)
    assert Path(found["path"], "model.safetensors").exists()


def test_a_preset_with_two_bases_needs_the_second_ones_transformer_alone(hub: Path, tmp_path: Path) -> None:
    preset = tmp_path / "own.yaml"
    lines = [
        "model:",
        "  family: sd3",
        f"  path: {SD3}",
        "  generator_init: someone/few-step",
        "  resolution: 32",
    ]
    preset.write_text("\n".join(lines) + "\n")
    publish_model(hub, SD3)
    absent = failures.explain(call(str(preset)).exception)
    assert absent.exit_code == 3 and "someone/few-step" in absent.message
    snapshot = publish_model(hub, "someone/few-step")
    for name in ("vae", "text_encoder"):
        shutil.rmtree(snapshot / name)
    found = json.loads(call(str(preset), "--json").stdout)
    assert [(each["source"], each["downloaded"]) for each in found] == [
        (SD3, False),
        ("someone/few-step", False),
    ]
    preset.write_text(f"extends: sd3-4step\nmodel:\n  path: mine.safetensors\n  components: {SD3}\n")
    (hub / f"models--{SD3.replace('/', '--')}/snapshots/{'b' * 40}/transformer").rename(tmp_path / "away")
    (rest,) = json.loads(call(str(preset), "--json").stdout)
    assert (rest["source"], rest["downloaded"]) == (SD3, False)


def test_what_is_built_in_needs_nothing(hub: Path) -> None:
    for name in ("shapes-clip", "shapes-geneval", "shapes-4step"):
        result = call(name)
        assert result.exit_code == 0 and "built in" in result.stderr


def test_a_name_that_is_nothing_is_refused_with_the_nearest(hub: Path) -> None:
    for wrong, right in (("pickscor", "pickscore"), ("sd3-4stp", "sd3-4step")):
        failure = failures.explain(call(wrong).exception)
        assert failure.exit_code == 2 and right in failure.hint

"""Both stages and sampling of every large family through the command line, on small models with a small CLIP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rtdmd_cli.cli import app
from rtdmd_cli.config import preset_names
from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.config.tune_reward import split_weights
from rtdmd_cli.engine.prompts.reading import read_prompt_set
from rtdmd_cli.engine.rewards.base import require_metadata
from rtdmd_cli.engine.rewards.registry import find_reward
from rtdmd_cli.engine.storage.checkpoint import load_checkpoint
from rtdmd_cli.engine.training.held_out import open_clip
from rtdmd_cli.errors import DataError, EnvironmentFailure
from tests.tiny_clip import save_clip
from tests.tiny_flux import TINY, Tiny, build_flux2_pipeline, save, tiny_folder
from tests.tiny_models import PROMPTS

UP = ".lora_B.weight"
SHARED, OWN = "flux2", "flux2-two-bases"


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """As many as before: a preset sets them for the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def write_preset(folder: Path, name: str) -> Tiny:
    """tiny.yaml and tiny.txt: 4 iterations, 1 epoch."""
    tiny = TINY[SHARED if name == OWN else name]
    model = f"family: {tiny.family}, path: {tiny_folder(tiny.family)}, resolution: 32, "
    model += f"text_length: {tiny.text_length}, guidance: {tiny.guidance}, teacher_steps: 2"
    if name == OWN:
        model += (
            f", generator_init: {save(build_flux2_pipeline(seed=1, is_distilled=True), folder / 'klein')}"
        )
    lora = f"lora: {{rank: 2, alpha: 4, targets: [{tiny.targets}]}}"
    rates = "generator_lr: 0.01, fake_lr: 0.01"
    clip = save_clip(folder / "clip")
    tune = f"rewards: [pickscore], reward_paths: ['pickscore={clip}'], epochs: 1, images_per_epoch: 4, "
    tune += f"images_per_prompt: 2, eval_images: 2, prompts: tiny.txt, {rates}, {lora}, "
    tune += f"eval_every: 1, watch: {{features: {clip}, prompt_count: 2, images_per_prompt: 2}}"
    (folder / "tiny.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    (folder / "tiny.yaml").write_text(
        f"model: {{{model}}}\n"
        f"distill: {{iterations: 4, batch: 2, fake_per_generator: 2, {rates}, prompts: tiny.txt, {lora}}}\n"
        f"tune_reward: {{{tune}}}\n"
        "hardware: {threads: 1, gradient_checkpointing: true}\n",
        encoding="utf-8",
    )
    return tiny


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The JSON that a command prints."""
    capsys.readouterr()
    code = app.main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("name", ["flux1", SHARED, OWN, "zimage", "qwenimage"])
def test_from_nothing_to_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    tiny = write_preset(tmp_path, name)
    made = call(capsys, "distill", "--preset", "tiny.yaml")
    assert made["finished"] and made["iterations"] == 4
    tuned = call(capsys, "tune-reward")
    assert tuned["finished"] and tuned["rewards"].keys() == {"pickscore"}
    lines = (Path(tuned["run"]) / "metrics.jsonl").read_text().splitlines()
    measured = [json.loads(line) for line in lines if "watch/diversity" in line]
    assert measured and 0 < measured[-1]["watch/diversity"] < 2 and measured[-1]["watch/frechet"] > 0
    for checkpoint in (made["checkpoint"], tuned["checkpoint"]):
        saved = load_checkpoint(Path(checkpoint))
        layers = {key.partition(".")[0] for key in saved.tensors["ema"]}
        assert layers == set(tiny.blocks)
        up = {key: t for key, t in saved.tensors["ema"].items() if key.endswith(UP)}
        assert {key.removesuffix(UP) for key, tensor in up.items() if not tensor.any()} == tiny.idle
    exported = call(capsys, "export", tuned["run"], "--no-check", "--format", "comfyui")
    card = (Path(exported["folder"]) / "README.md").read_text()
    assert "| pickscore | trained on |" in card and "not measured" not in card
    pictures = {}
    for source in (tuned["run"], made["run"], "tiny.yaml"):
        size = ("--width", "16") if source == made["run"] else ()
        drawn = call(capsys, "sample", PROMPTS[0], "--from", source, "--out", f"{len(pictures)}", *size)
        pictures[source] = drawn
        with Image.open(drawn["pictures"][0]["path"]) as image:
            assert image.size == (16 if size else 32, 32)
    assert [each["evaluations"] for each in pictures.values()] == [4, 4, 2 if name == "flux1" else 4]
    assert len({each["model_hash"] for each in pictures.values()}) == 3


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_ready_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(capsys, "presets", "validate", name)
    prompts = ("--set", "distill.prompts=builtin:shapes")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    code = app.main(["distill", "--preset", name, "--dry-run", "--json", *prompts])
    plan = json.loads(capsys.readouterr().out)
    assert plan["preset"] == name and plan["generator_updates"] > 0 and not list(tmp_path.iterdir())
    missing = [] if plan["model"].startswith("builtin:") else [plan["model"]]
    assert code == (3 if missing else 0) and all(path in plan["to_download"] for path in missing)
    assert all(any(path in each for each in plan["findings"]) for path in missing)


prompts_of = cache(read_prompt_set)  # thousands, and the same for many presets


@pytest.mark.parametrize("name", [name for name in preset_names() if not name.startswith("shapes")])
def test_every_real_preset_measures_on_prompts_that_it_does_not_train_on(name: str) -> None:
    tune = load_preset(name, environ={}).preset.tune_reward
    assert tune.eval_every and tune.watch.features and tune.held_out and tune.eval_prompts
    trained, measured = prompts_of(tune.prompts), prompts_of(tune.eval_prompts)
    assert not set(trained.texts) & set(measured.texts)
    for reward in (*split_weights(tune.rewards), *tune.held_out):
        require_metadata(find_reward(reward), measured.metadata)
    used = [find_reward(reward) for reward in (*split_weights(tune.rewards), *tune.held_out)]
    assert any(need.source == tune.watch.features for each in used for need in each.needs)


@pytest.mark.parametrize(
    ("source", "command"),
    [("openai/clip-vit-large-patch14", "rtdmd fetch clipscore"), ("some/clip", "hf download some/clip")],
)
def test_features_that_are_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, command: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EnvironmentFailure, match=f"watch.features.*{source}") as caught:
        open_clip(source, torch.device("cpu"))
    assert command in caught.value.hint and "tune_reward.watch.features=null" in caught.value.hint
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"watch\.features.*not a complete CLIP"):
        open_clip(str(tmp_path / "empty"), torch.device("cpu"))


def test_a_model_that_cannot_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 3 with what to do, before anything is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("flux1-4step", "flux2-klein-4b-4step", "sd35-4step", "zimage-4step", "qwenimage-4step"):
        code = app.main(["distill", "--preset", name, "--set", "distill.prompts=builtin:shapes"])
        out, err = capsys.readouterr()
        assert code == 3 and out == "" and "HF_HUB_OFFLINE" in err
    assert not (tmp_path / "runs").exists()

"""The commands on a device whose tensors don't mix with the CPU's: see `tests.pretend_device`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import fork, wait
from tests.tiny_models import TEXT_LENGTH, sd3_folder

PROMPTS = ("a photo of a red circle", "a photo of two blue rings")
DISTILL = "distill --preset tiny.yaml --name one --quiet --set distill.iterations="
COMMANDS = (
    f"{DISTILL}1",
    f"{DISTILL}2 --resume runs/one",
    "tune-reward --from runs/one --name two --quiet",
    "sample 'a photo of a ring' --from runs/two --quiet",
    "eval tiny.txt --rewards shapes-clip,shapes-geneval --from runs/two --compare runs/one --out evals/two --quiet",
    "export runs/two --format diffusers --quiet",
)
READ, UNDO = "copy in engine/training/trainer.py, on_host", "late in engine/training/undo.py, _on_host"
PARTS = 2  # of every turn


def write_preset(folder: Path) -> None:
    """tiny.yaml and tiny.txt: bf16 and two parts a turn, with everything that is done beside the training."""
    (folder / "tiny.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    where = f"family: sd3, path: {sd3_folder()}, resolution: 32, text_length: {TEXT_LENGTH}"
    rates = "generator_lr: 0.01, fake_lr: 0.01, prompts: tiny.txt, sample_every: 0, save_every: 1"
    watch = "eval_every: 1, watch: {features: 'builtin:shapes', prompt_count: 2, images_per_prompt: 2}"
    epoch = "epochs: 1, images_per_epoch: 4, images_per_prompt: 2, micro_batch: 2, eval_images: 2"
    lora = "lora: {rank: 2, alpha: 4}"
    (folder / "tiny.yaml").write_text(
        f"model: {{{where}, guidance: 4.0, teacher_steps: 1}}\n"
        f"distill: {{batch: {PARTS}, micro_batch: 1, fake_per_generator: 1, {rates}, {lora}}}\n"
        f"tune_reward: {{rewards: [shapes-clip, shapes-geneval], {epoch}, {watch}, {rates}, {lora}}}\n"
        "hardware: {threads: 1, gradient_checkpointing: true, dtype: bf16}\n",
        encoding="utf-8",
    )


@pytest.fixture(scope="module")
def turns(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each iteration and epoch asked of the device, of runs that ended well."""
    folder = tmp_path_factory.mktemp("pretend")
    write_preset(folder)
    done = wait(fork(folder, *COMMANDS, program="tests.pretend_program"))
    assert done.code == 0, done.err
    wanted = ("samples/*.png", "evals/two/results.json", "exports/two/*.safetensors")
    assert all(list(folder.glob(pattern)) for pattern in wanted)
    noted: dict[str, list[dict[str, Any]]] = json.loads((folder / "turns.json").read_text("utf-8"))
    return noted


def test_a_turn_of_stage_1_stops_once_however_many_parts_it_has(
    turns: dict[str, list[dict[str, Any]]],
) -> None:
    """And then keeps what it would need to be undone."""
    assert len(turns["distill"]) == 2
    for asked in turns["distill"]:
        assert asked.pop(UNDO) > 0
        assert asked == {READ: 2}  # fake score and generator


def test_an_epoch_of_stage_2_stops_between_its_phases(turns: dict[str, list[dict[str, Any]]]) -> None:
    (asked,) = turns["tune"]
    rewards = {key: asked.pop(key) for key in list(asked) if "judges/" in key or "engine/rewards/" in key}
    assert rewards.pop("copy in engine/rewards/mixture.py, pull") == 2 * PARTS  # values and gradient
    assert not any("mixture" in key for key in rewards)
    assert asked.pop(UNDO) > 0
    assert asked == {
        READ: 2,
        "copy in engine/compute/device.py, add": 4 * PARTS,  # latents, log-probabilities, pictures, gradients
    }

"""Runs with a quantised base, 8-bit optimiser states and full-weight training: resumed exactly, sampled, tuned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rtdmd_cli.config.loader import Resolved, preset_sha256
from rtdmd_cli.config.schema import DistillConfig, HardwareConfig, Preset
from rtdmd_cli.config.section import LoraConfig
from rtdmd_cli.engine.distill import run as distill_run
from rtdmd_cli.engine.distill.run import run_distill
from rtdmd_cli.engine.prompts.reading import PromptSet
from rtdmd_cli.engine.sampling.model import open_model
from rtdmd_cli.engine.sampling.source import resolve
from rtdmd_cli.engine.storage.checkpoint import Checkpoint, load_checkpoint
from rtdmd_cli.engine.storage.run_folder import RunFolder
from rtdmd_cli.engine.training.session import Outcome
from rtdmd_cli.engine.training.start import Start
from rtdmd_cli.engine.training.trainer import Trainer
from rtdmd_cli.engine.tune_reward import stage as tune_stage
from rtdmd_cli.engine.tune_reward.rollouts import Tuner
from rtdmd_cli.engine.tune_reward.run import run_tune
from rtdmd_cli.engine.tune_reward.watch import BEFORE
from tests.tiny_models import PROMPTS, sd3_config
from tests.tiny_runs import write_preset
from tests.tiny_tuning import tune_preset

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
TRAINING = PromptSet(PROMPTS, [{}] * len(PROMPTS))
NOTHING = Start(None, None)
FULL = {"distill": {"train": "full"}}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "full": FULL,
    "medium": {"hardware": {"float32_matmul": "medium"}},
    "mixed": {"hardware": {"mixed_precision": "bf16"}},
    "mixed-full": {"hardware": {"mixed_precision": "bf16", "gradient_checkpointing": True}, **FULL},
    "nf4": {"hardware": {"base": "nf4", "optimizer": "adamw8bit", "gradient_checkpointing": True}},
}
"""Adapters of rank 128 on a width of 32: matrices of 4,096 elements, whose states are kept in 8 bits."""


def preset(iterations: int, settings: dict[str, dict[str, Any]]) -> Preset:
    config: dict[str, Any] = {
        "iterations": iterations,
        "batch": 1,
        "fake_per_generator": 1,
        "fake_lr": 1e-3,
        "generator_lr": 1e-3,
        "sample_every": 0,
        "lora": LoraConfig(rank=128, alpha=128),
    }
    return Preset(
        name="tiny",
        model=sd3_config(),
        distill=DistillConfig(**(config | settings.get("distill", {}))),
        hardware=HardwareConfig(**settings.get("hardware", {})),
    )


def distill(out: Path, name: str, iterations: int, setting: str, start: Start = NOTHING) -> Outcome:
    chosen = preset(iterations, SETTINGS[setting])
    resolved = Resolved(chosen, {}, preset_sha256(chosen))
    return run_distill(resolved, TRAINING, start, out, name, ["rtdmd"], lambda text: None, True)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of this module's runs, with its own cache of encoded prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RTDMD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(out: Path) -> dict[str, Checkpoint]:
    """The last checkpoint of two iterations in a row, by setting."""
    return {setting: load_checkpoint(distill(out, setting, 2, setting).checkpoint) for setting in SETTINGS}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_is_continued_exactly(out: Path, finished: dict[str, Checkpoint], setting: str) -> None:
    begun = distill(out, f"{setting}-broken", 1, setting)
    start = Start(RunFolder(begun.run), load_checkpoint(begun.checkpoint))
    found = load_checkpoint(distill(out, f"{setting}-broken", 2, setting, start).checkpoint)
    expected = finished[setting]
    assert found.tensors.keys() == expected.tensors.keys()
    for group, tensors in expected.tensors.items():
        assert tensors and found.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(found.tensors[group][name], tensor), f"{group}: {name}"
            assert found.tensors[group][name].dtype == tensor.dtype
    moved = [
        not torch.equal(v, start.checkpoint.tensors["generator"][k])
        for k, v in expected.tensors["generator"].items()
    ]  # type: ignore[union-attr]
    assert any(moved)


def test_the_precision_of_products_is_that_of_the_training_alone(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen, made = torch.get_float32_matmul_precision(), [], list[torch.dtype]()
    turn = distill_run.iterate

    def output(transformer: torch.nn.Module, *arguments: Any) -> None:
        made.append(arguments[-1][0].dtype)

    def spy(trainer: Trainer, iteration: int) -> None:
        with trainer.backbone.transformer.register_forward_hook(output):
            turn(trainer, iteration)
        seen.append((torch.get_float32_matmul_precision(), *set(made)))
        made.clear()

    monkeypatch.setattr(distill_run, "iterate", spy)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for setting in ("full", "medium", "mixed"):
        distill(out, f"{setting}-seen", 1, setting)
        assert torch.get_float32_matmul_precision() == before
    assert seen == [("highest", FP32), ("medium", FP32), ("highest", BF16)]


def test_what_a_checkpoint_holds(finished: dict[str, Checkpoint]) -> None:
    states = finished["nf4"].tensors["optimizer_generator"]
    assert {tensor.dtype for name, tensor in states.items() if name.endswith("/state1")} == {torch.uint8}
    weights = finished["full"].tensors["generator"]
    assert "pos_embed.proj.weight" in weights and not any("lora" in name for name in weights)


def test_a_generator_trained_in_full_is_sampled(out: Path, finished: dict[str, Checkpoint]) -> None:
    """The transformer has the average's weights, and its hash is not the base's."""
    model = open_model(resolve(str(out / "full"), out), CPU, torch.float32)
    assert model.roles is None and model.source.kind == "generator"
    ema = finished["full"].tensors["ema"]
    loaded = dict(model.backbone.transformer.named_parameters())
    assert loaded.keys() == ema.keys() and all(torch.equal(loaded[name], ema[name]) for name in ema)
    other = open_model(resolve(str(out / "nf4"), out), CPU, torch.float32)
    assert other.roles is not None and other.model_hash != model.model_hash


def test_pictures_of_another_storage_are_another_models(tmp_path: Path) -> None:
    """The base of a preset, plain and in 8 bits: another hash, for the pictures differ."""
    hashes = []
    for base in ("plain", "int8"):
        path = write_preset(tmp_path / f"{base}.yaml")
        path.write_text(path.read_text("utf-8") + f"hardware:\n  base: {base}\n", encoding="utf-8")
        hashes.append(open_model(resolve(str(path), tmp_path), CPU, torch.float32).model_hash)
    assert hashes[0] != hashes[1]


def test_stage_2_on_a_generator_trained_in_full(out: Path, finished: dict[str, Checkpoint]) -> None:
    begin = finished["full"]
    values = {"rewards": ("shapes-clip",), "epochs": 1, "eval_images": 0, "sample_every": 0}
    plain = tune_preset(**values)
    chosen = plain.model_copy(update={"distill": plain.distill.model_copy(update=FULL["distill"])})
    resolved = Resolved(chosen, {}, preset_sha256(chosen))
    outcome = run_tune(
        resolved, TRAINING, TRAINING, begin, NOTHING, out, "tuned", ["rtdmd"], lambda text: None, True
    )
    saved = load_checkpoint(outcome.checkpoint)
    assert "stage1_fake" not in saved.tensors
    before, start, after = begin.tensors["ema"], saved.tensors["stage1_generator"], saved.tensors["generator"]
    assert all(torch.equal(start[name], tensor) for name, tensor in before.items())
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
    model = open_model(resolve(str(outcome.run), out), CPU, torch.float32)
    loaded = dict(model.backbone.transformer.named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.tensors["ema"].items())


def test_a_continued_run_shows_the_stage_1_that_it_began_from(
    out: Path, finished: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """In the second row of its grids, even where the stage-1 run has gone on since."""
    begin = finished["full"]
    moved = {
        group: {name: tensor + 0.1 for name, tensor in part.items()} for group, part in begin.tensors.items()
    }
    grids = []
    for name, stages in (("straight", (2,)), ("continued", (1, 2))):
        values = {"rewards": ("shapes-clip",), "eval_images": 0, "sample_every": 1, "save_every": 1}
        start = NOTHING
        for epochs in stages:
            plain = tune_preset(**values, epochs=epochs)
            chosen = plain.model_copy(update={"distill": plain.distill.model_copy(update=FULL["distill"])})
            resolved, where = Resolved(chosen, {}, preset_sha256(chosen)), (start, tmp_path, name, ["rtdmd"])
            stage_1 = begin if start is NOTHING else replace(begin, tensors=moved)
            outcome = run_tune(resolved, TRAINING, TRAINING, stage_1, *where, lambda text: None, True)
            start = Start(RunFolder(outcome.run), load_checkpoint(outcome.checkpoint))
        grids.append((outcome.run / "samples" / "step-000002.png").read_bytes())
    assert grids[0] == grids[1]


def test_stage_2_in_mixed_precision(
    out: Path, finished: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The epoch's own rewards are of pictures in bf16, near the exact ones; what is measured before it is exact."""
    turn, decoded = tune_stage.tune, list[set[torch.dtype]]()

    def spy(tuner: Tuner, epoch: int) -> None:
        made: list[torch.dtype] = []
        with tuner.core.backbone.decoder.register_forward_hook(lambda *all_: made.append(all_[-1].dtype)):
            turn(tuner, epoch)
        decoded.append(set(made))

    monkeypatch.setattr(tune_stage, "tune", spy)
    values = {"rewards": ("shapes-clip",), "epochs": 1, "eval_images": 4, "sample_every": 0}
    rewards, measured, weights = [], [], []
    for setting in ("none", "bf16"):
        hardware = HardwareConfig.model_validate({"mixed_precision": setting})
        chosen = tune_preset(**values).model_copy(update={"hardware": hardware})
        chosen = chosen.model_copy(update={"distill": chosen.distill.model_copy(update=FULL["distill"])})
        outcome = run_tune(
            Resolved(chosen, {}, preset_sha256(chosen)),
            *(TRAINING, TRAINING, finished["full"], NOTHING, out, f"tuned-{setting}", ["rtdmd"]),
            lambda text: None,
            True,
        )
        lines = [json.loads(line) for line in (outcome.run / "metrics.jsonl").read_text().splitlines()]
        rewards.append(next(line["reward/shapes-clip"] for line in lines if "reward/shapes-clip" in line))
        measured.append(outcome.records[BEFORE])
        weights.append(load_checkpoint(outcome.checkpoint).tensors["generator"])
    assert 0 < abs(rewards[0] - rewards[1]) < 0.01
    assert decoded == [{FP32}, {BF16}]
    assert measured[0] and measured[0] == measured[1]
    assert any(not torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())

"""Both stages of every family on shapes alone: whatever reads a number back from the device raises an error there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rtdmd_cli.config.schema import DistillConfig, HardwareConfig, Preset, SamplerConfig
from rtdmd_cli.config.section import LoraConfig
from rtdmd_cli.config.tune_reward import TuneRewardConfig
from rtdmd_cli.engine.backbones.families import FAMILIES
from rtdmd_cli.engine.distill import recipe as distill
from rtdmd_cli.engine.distill.run import trainer_on
from rtdmd_cli.engine.planning.account import Account
from rtdmd_cli.engine.planning.depth import depths, with_depths
from rtdmd_cli.engine.planning.skeleton import Skeleton, skeleton
from rtdmd_cli.engine.rewards.scoring import Scores
from rtdmd_cli.engine.training.assembly import training_sigmas
from rtdmd_cli.engine.training.trainer import Draws, Trainer
from rtdmd_cli.engine.tune_reward import recipe as tune
from rtdmd_cli.engine.tune_reward.fake_score import update_fake_score
from rtdmd_cli.engine.tune_reward.pull import latent_gradient
from rtdmd_cli.engine.tune_reward.rollouts import ROLLOUT, Pull, Rollouts, Tuner, conditioning, roll_out_part
from rtdmd_cli.engine.tune_reward.run import tuner_on
from tests.tiny_flux import TINY, tiny_config, tiny_folder

PROMPTS = [0, 0, 1, 1]
STEPS = (1000, 700, 400)  # of a rollout: two that draw noise and the last


@pytest.fixture(autouse=True)
def forms_kept() -> Iterator[None]:
    """As in a plan: the form of a result that was made before is looked up, as torch takes long to find it."""
    with Account():
        yield


class Brightness:
    """A reward with a gradient."""

    weights = {"brightness": 1.0}
    differentiable = ("brightness",)

    def score(self, images: Tensor, prompts: Sequence[int]) -> Scores:
        raise NotImplementedError

    def combined(self, rewards: Mapping[str, Tensor]) -> Tensor | None:
        return rewards["brightness"]

    def pull(
        self, images: Tensor, rows: Sequence[int], prompts: Sequence[int], size: int
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def configs_of(folder: Path) -> dict[str, Any]:
    files = [*folder.glob("*/config.json"), folder / "scheduler/scheduler_config.json"]
    return {path.parent.name: json.loads(path.read_text("utf-8")) for path in files}


def preset_of(name: str, train: str, boundaries: str) -> Preset:
    every = boundaries == "every"
    lora = LoraConfig(rank=2, alpha=2, targets=tuple(TINY[name].targets.split(", ")))
    settings = {"boundaries": boundaries, "boundaries_batched": every, "consistency_batched": every}
    return Preset(
        name="tiny",
        model=tiny_config(name),
        sampler=SamplerConfig(raw_steps=STEPS),
        distill=DistillConfig.model_validate(
            {"batch": 4, "micro_batch": 2 if every else 4, "train": train, "lora": lora, **settings}
        ),
        tune_reward=TuneRewardConfig(
            images_per_epoch=4,
            images_per_prompt=2,
            micro_batch=2 if every else 4,
            lora=lora,
            kl_weight=0.1,
            matching="distill" if every else "last",
        ),
        hardware=HardwareConfig(gradient_checkpointing=every),
    )


def on_shapes(preset: Preset, name: str) -> tuple[Skeleton, tuple[float, ...]]:
    configs = configs_of(tiny_folder(name))
    few = dict.fromkeys(depths(configs["transformer"]), 1)
    configs["transformer"] = with_depths(
        configs["transformer"], few | ({"num_layers": 2} if name == "sd3" else {})
    )
    dtype = torch.float32 if preset.distill.train == "full" else torch.bfloat16
    made = skeleton(preset.model, preset.hardware, dtype, configs)
    return made, training_sigmas(made.backbone, preset)


def reading(trainer: Trainer, reads: list[int]) -> None:
    """Stand in for the one transfer of a turn."""

    def read(values: Tensor) -> list[float]:
        reads.append(len(values))
        return [1.0] * len(values)

    trainer.read = read
    trainer.boundary = lambda trainer, turn, iteration: 2


CASES = [
    *((name, "lora", "one") for name in TINY),
    ("flux1", "lora", "every"),  # boundaries in one batch, in parts, with checkpointing
    ("sd3", "full", "every"),
]


@pytest.mark.parametrize(("name", "train", "boundaries"), CASES)
def test_a_turn_reads_once(name: str, train: str, boundaries: str) -> None:
    preset = preset_of(name, train, boundaries)
    made, sigmas = on_shapes(preset, name)
    reads = list[int]()
    trainer = trainer_on(sigmas, made.backbone, preset, 2, made.prompts(2).select, made.prompts(1))
    reading(trainer, reads)
    distill.update_fake_score(trainer, 0, PROMPTS)
    assert len(reads) == 1 and set(trainer.metrics) >= {"fake_loss", "fake_grad_norm"}
    distill.update_generator(trainer, 0, PROMPTS)
    assert len(reads) == 2 and set(trainer.metrics) >= {"dmd_loss", "generator_grad_norm"}
    trained = [each for role in ("fake", "generator") for each in trainer.roles.named_parameters(role)]
    idle = tuple(layer.partition(".attn")[2] for layer in TINY[name].idle)  # in any number of blocks
    for key, parameter in trained:
        if parameter.grad is None:
            assert key.partition(".lora_")[0].endswith(idle), key
        else:
            assert parameter.grad.shape == parameter.shape
    assert all(p.dtype == torch.float32 and p.is_meta for _, p in trained)


def epoch_on_shapes(tuner: Tuner) -> Rollouts:
    """Images in host memory, as an epoch's are; the part that rolls them out runs on shapes too."""
    cond = conditioning(tuner.core, PROMPTS[:2])
    with torch.no_grad(), tuner.core.roles.role("generator"):
        x, logp = roll_out_part(tuner, Draws(tuner.core, ROLLOUT, 0, range(2)), cond, (0, 1))
    assert x.shape == (2, 4, *tuner.core.shape) and logp.shape == (2, 2)
    images, logps = torch.zeros(4, 4, *tuner.core.shape), torch.zeros(4, 2)
    pull = Pull(torch.zeros(4), images[:, -1])
    return Rollouts(images, logps, torch.tensor(PROMPTS), (0, 1), (range(2), range(2, 4)), 0, 4, pull=pull)


@pytest.mark.parametrize(("name", "train", "boundaries"), CASES)
def test_a_turn_of_stage_2_reads_once(name: str, train: str, boundaries: str) -> None:
    preset = preset_of(name, train, boundaries)
    made, sigmas = on_shapes(preset, name)
    reads = list[int]()
    tuner = tuner_on(sigmas, made.backbone, preset, Brightness(), 2, made.prompts(2).select, made.prompts(1))
    reading(tuner.core, reads)
    rollouts, advantages = epoch_on_shapes(tuner), torch.zeros(4)
    x0 = torch.empty(2, *tuner.core.shape, device="meta")
    side = preset.model.resolution
    assert latent_gradient(made.backbone, x0, torch.empty(2, 3, side, side, device="meta")).shape == x0.shape
    update_fake_score(tuner, 0, rollouts, advantages)
    assert len(reads) == 1
    tune.update_generator(tuner, 0, rollouts, advantages)
    assert len(reads) == 2
    assert set(tuner.core.metrics) >= {"fake_loss", "dmd_loss", "drift", "kl", "hinge_loss"}


def test_shapes_have_no_numbers() -> None:
    """Else the tests above could not fail."""
    preset = preset_of("sd3", "lora", "one")
    made, _ = on_shapes(preset, "sd3")
    x = made.prompts(1).embeds
    with pytest.raises(RuntimeError, match="meta"):
        float(x.sum())
    with pytest.raises(NotImplementedError, match="no data"):
        x.cpu()


def test_every_family_is_tried() -> None:
    assert {TINY[name].family for name in TINY} == set(FAMILIES)

"""How often each phase of a stage is gone through, and so the floating-point operations of the whole."""

from __future__ import annotations

from rtdmd_cli.config.schema import DistillConfig, Preset
from rtdmd_cli.engine.planning import phases as names
from rtdmd_cli.engine.rewards.scoring import SCORE_BATCH
from rtdmd_cli.engine.training.previews import COUNT
from rtdmd_cli.engine.tune_reward.run import stage_1_settings

REWARD = "reward "
"""Begins the names of the phases of scoring."""
GRADIENT = "gradient of "
"""Begins the names of the phases in which gradients by pictures and latents are taken."""


def stage_flops(preset: Preset, stage: str, flops: dict[str, int], encoding: int) -> float:
    """Operations of a whole stage: training, sample grids, measurements, and the prompts' encoding, once.

    flops: by phase, as `phases.Phase` counts them.
    """
    return encoding + (distill_flops if stage == "distill" else tune_flops)(preset, flops)


def extra_evaluations(config: DistillConfig, steps: int) -> float:
    """Evaluations of a rollout, on average, beyond those of the counted turn, which stops at the first boundary it can."""
    return 0.0 if config.boundaries == "every" else (steps + 1) / 2 - min(steps, config.backprop_steps)


def sampling_flops(preset: Preset, flops: dict[str, int], size: int, pictures: int) -> float:
    """Of `pictures` by the generator, decoded. size: of the counted evaluation."""
    steps = len(preset.sampler.raw_steps)
    return pictures * (steps * flops[names.ROLL] / size + flops[names.DECODE] / COUNT)


def teacher_flops(preset: Preset, flops: dict[str, int], pictures: int) -> float:
    """Of `pictures` by the teacher, decoded."""
    return pictures / COUNT * (preset.model.teacher_steps * flops[names.GRID] + flops[names.DECODE])


def grids(total: int, every: int) -> int:
    """How many grids a run draws, the last one among them."""
    return 1 + (total - 1) // every if every else 1


def distill_flops(preset: Preset, flops: dict[str, int]) -> float:
    """Of stage 1."""
    config, steps = preset.distill, len(preset.sampler.raw_steps)
    size = config.micro_batch or config.batch
    rest = extra_evaluations(config, steps) * flops[names.ROLL]
    turns = config.iterations * (flops[names.FAKE_TURN] + rest)
    turns += config.iterations // config.fake_per_generator * (flops[names.GENERATOR_TURN] + rest)
    pictures = grids(config.iterations, config.sample_every) * 2 * COUNT  # the grid's, and those of `lag`
    shown = sampling_flops(preset, flops, size, pictures) + teacher_flops(preset, flops, COUNT)
    return config.batch / size * turns + shown


def tune_flops(preset: Preset, flops: dict[str, int]) -> float:
    """Of stage 2."""
    config, steps = preset.tune_reward, len(preset.sampler.raw_steps)
    size = config.micro_batch or config.images_per_epoch
    images, scored = config.images_per_epoch, min(SCORE_BATCH, config.images_per_epoch)
    matched = config.matching_images or images
    extra = extra_evaluations(stage_1_settings(preset), steps) * flops[names.ROLL]
    rest = extra if config.matching == "distill" else 0.0
    scoring = sum(value for name, value in flops.items() if name.startswith(REWARD)) / scored
    epoch = sampling_flops(preset, flops, size, images) + images * scoring
    fake = 0.0 if config.tilt else rest
    fakes = matched if config.tilt or config.matching == "distill" else images
    epoch += fakes / size * (flops.get(names.FAKE_TURN, 0) + fake)
    gradients = sum(value for name, value in flops.items() if name.startswith(GRADIENT))
    epoch += images / size * (flops[names.GENERATOR_TURN] + gradients)
    epoch += matched / size * (flops.get(names.MATCHING, 0) + rest * (names.MATCHING in flops))
    return config.epochs * epoch + measuring_flops(preset, flops, size, scoring)


def measuring_flops(preset: Preset, flops: dict[str, int], size: int, scoring: float) -> float:
    """Of stage 2's measurements, at start, end and in between, and of its grids."""
    config, watch = preset.tune_reward, preset.tune_reward.watch
    times = 2 + ((config.epochs - 1) // config.eval_every if config.eval_every else 0)
    watched = watch.prompt_count * watch.images_per_prompt if watch.features else 0
    pictures = times * (config.eval_images + watched) + grids(config.epochs, config.sample_every) * 2 * COUNT
    found = sampling_flops(preset, flops, size, pictures) + times * config.eval_images * scoring
    return found + (teacher_flops(preset, flops, watch.prompt_count) if watch.features else 0.0)

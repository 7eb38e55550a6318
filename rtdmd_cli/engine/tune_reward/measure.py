"""What a stage-2 run measures on fixed prompts and seeds: rewards, diversity, distance to the teacher."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rtdmd_cli.config.schema import Preset
from rtdmd_cli.engine.backbones.base import Conditioning
from rtdmd_cli.engine.judges.features import ClipScorer, frechet_distance, pairwise_cosine_distances
from rtdmd_cli.engine.prompts.reading import PromptSet
from rtdmd_cli.engine.rewards import shapes_clip
from rtdmd_cli.engine.rewards.mixture import RewardMixture
from rtdmd_cli.engine.rewards.registry import REWARDS
from rtdmd_cli.engine.rewards.scoring import require_judged
from rtdmd_cli.engine.roles.base import GENERATOR
from rtdmd_cli.engine.sampling.sample import Kind, decode_all, generate, sampling_plan
from rtdmd_cli.engine.training.trainer import Trainer
from rtdmd_cli.errors import DataError, EnvironmentFailure

BUILTIN = "builtin:shapes"
"""Stands for the package's CLIP that judges and is never trained on."""


@dataclass(frozen=True)
class Measurement:
    """Fixed prompts. cond: [n], a row for each of `prompts`, with which one picture of each is scored.

    wide: [m] likewise, of the prompts of diversity and distance; none without `watch.features`. teacher: features
    [m,D] of one picture each by the teacher, of `teacher_features`.
    """

    prompts: PromptSet
    cond: Conditioning
    preset: Preset
    wide: Conditioning | None = None
    teacher: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)


@dataclass(frozen=True)
class Measured:
    """Mean and (population) standard deviation of each reward, held-out ones first, over the pictures.

    features: "diversity" and "frechet", or nothing. prompts: how many these are of, the teacher's pictures likewise.
    diversities: of each of these prompts, whose mean "diversity" is.
    """

    means: dict[str, float]
    stds: dict[str, float]
    features: dict[str, float]
    prompts: int = 0
    diversities: tuple[float, ...] = ()


def evenly_chosen(prompts: PromptSet, count: int) -> PromptSet:
    """`count` prompts, evenly spread over the set, or all of them."""
    count = min(count, len(prompts))
    return prompts.pick([(2 * i + 1) * len(prompts) // (2 * count) for i in range(count)])


def measure(
    core: Trainer, measurement: Measurement, mixture: RewardMixture, where: str, tell: Callable[[str], None]
) -> Measured:
    """All figures of the EMA's weights. Pictures that a reward can't judge are left out, and `tell` is told of them.

    where: "the measurement of epoch 3", for messages. RewardFailure if more than `tune_reward.max_bad_share` are.
    """
    means, stds = {}, {}
    images = measured_images(core, measurement)
    if len(images):
        scores = mixture.measure(images, measurement.prompts)
        rows = require_judged(scores, measurement.preset.tune_reward.max_bad_share, where, tell)
        for name, values in scores.rewards.items():
            means[name] = float(values[rows].mean())
            stds[name] = float(values[rows].std(correction=0))
    features, diversities = feature_figures(core, measurement)
    return Measured(means, stds, features, len(measurement.teacher), diversities)


def measured_images(core: Trainer, measurement: Measurement) -> Tensor:
    """One picture of each measured prompt, [n,3,H,W]."""
    keys = [(i, 0) for i in range(len(measurement.prompts))]
    return pictures(core, measurement.preset, "generator", measurement.cond, keys)


def pictures(
    core: Trainer, preset: Preset, kind: Kind, cond: Conditioning, keys: Sequence[tuple[int, int]]
) -> Tensor:
    """Pictures [N,3,H,W] of the generator's EMA or of the teacher, from the evaluation's seed.

    keys: (prompt, picture); cond: a row for each prompt.
    """
    if not keys:
        return torch.empty(0)
    plan, batch = sampling_plan(kind, core.backbone, preset.model, preset.sampler), preset.evaluate.batch
    with core.roles.swapped(GENERATOR, core.ema):
        latents = generate(
            core.backbone,
            core.roles,
            plan,
            cond,
            core.empty,
            keys,
            shape=core.shape,
            seed=preset.evaluate.seed,
            batch=batch,
        )
    return decode_all(core.backbone, latents, batch)


def teacher_features(core: Trainer, preset: Preset, wide: Conditioning | None) -> Tensor:
    """Features [m,D] of the teacher's pictures, one of each prompt of `wide` [m]; [0] for None."""
    if wide is None:
        return torch.empty(0)
    images = pictures(core, preset, "teacher", wide, [(i, 0) for i in range(len(wide))])
    return features_of(core, preset, images)


def feature_figures(core: Trainer, measurement: Measurement) -> tuple[dict[str, float], tuple[float, ...]]:
    """`Measured.features` and `Measured.diversities`.

    diversity: mean cosine distance between the pictures of a prompt. frechet: squared Frechet distance of all of
    them to the teacher's, which depends on the numbers of pictures.
    """
    if measurement.wide is None:
        return {}, ()
    count = measurement.preset.tune_reward.watch.images_per_prompt
    keys = [(i, j) for i in range(len(measurement.wide)) for j in range(count)]
    images = pictures(core, measurement.preset, "generator", measurement.wide, keys)
    features = features_of(core, measurement.preset, images)
    each = pairwise_cosine_distances(features, [prompt for prompt, _ in keys])
    distance = frechet_distance(features, measurement.teacher)
    return {"diversity": float(each.mean()), "frechet": distance}, tuple(each.tolist())


@torch.no_grad()
def features_of(core: Trainer, preset: Preset, images: Tensor) -> Tensor:
    """Features [N,D] of length 1. The CLIP is loaded for it and freed afterwards."""
    source = preset.tune_reward.watch.features
    assert source is not None
    clip = open_clip(source, core.backbone.device)
    return torch.cat([clip.image_features(part).cpu() for part in images.split(preset.evaluate.batch)])


def open_clip(source: str, device: torch.device) -> ClipScorer:
    """The CLIP that `watch.features` names. Errors as `ClipScorer.load`; what is missing is said with its command."""
    if source == BUILTIN:
        return shapes_clip.load_held_out(device).scorer
    try:
        return ClipScorer.load(source, device)
    except EnvironmentFailure as error:
        owners = [each.name for each in REWARDS.values() if any(need.source == source for need in each.needs)]
        fetch = f"rtdmd fetch {owners[0]}" if owners else f"hf download {source}"
        hint = f"Fetch it: {fetch}, or give a folder. Or do without: --set tune_reward.watch.features=null"
        raise EnvironmentFailure(f"`tune_reward.watch.features`: {error.message}", hint) from error
    except DataError as error:
        hint = error.hint or "Give the folder of a CLIP, or do without: --set tune_reward.watch.features=null"
        raise DataError(f"`tune_reward.watch.features`: {error.message}", hint) from error

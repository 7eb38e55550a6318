"""What a stage-2 run measures on fixed prompts and seeds: rewards, diversity, distance to the teacher."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rtdmd_cli.config.schema import Preset
from rtdmd_cli.engine.backbones.base import Conditioning
from rtdmd_cli.engine.judges.features import frechet_distance, pairwise_cosine_distances
from rtdmd_cli.engine.prompts.reading import PromptSet
from rtdmd_cli.engine.rewards.mixture import RewardMixture
from rtdmd_cli.engine.rewards.scoring import require_judged
from rtdmd_cli.engine.training.held_out import draw, open_clip
from rtdmd_cli.engine.training.trainer import Trainer


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
    return draw(core, measurement.preset, "generator", measurement.cond, keys)


def teacher_features(core: Trainer, preset: Preset, wide: Conditioning | None) -> Tensor:
    """Features [m,D] of the teacher's pictures, one of each prompt of `wide` [m]; [0] for None."""
    if wide is None:
        return torch.empty(0)
    images = draw(core, preset, "teacher", wide, [(i, 0) for i in range(len(wide))])
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
    images = draw(core, measurement.preset, "generator", measurement.wide, keys)
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

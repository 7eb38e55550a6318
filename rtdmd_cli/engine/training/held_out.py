"""Whether the pictures of a stage-1 run get better: figures that are measured with each sample grid and never trained on.

    previews/strict_score       share of held-out captions of the built-in world that the pictures show, by GenEval's rule
    previews/clip_score         mean cosine of the grid's pictures with their prompts, by the CLIP of `watch.features`
    previews/teacher_distance   mean cosine distance of their features to those of the teacher's pictures, same prompt
                                and noise

The built-in world has the first, other models the other two, where the preset names a CLIP that is on this machine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rtdmd_cli.config.schema import Preset
from rtdmd_cli.engine.backbones.base import Backbone, Conditioning
from rtdmd_cli.engine.backbones.locating import BUILTIN as BUILTIN_MODELS
from rtdmd_cli.engine.judges.features import ClipScorer
from rtdmd_cli.engine.prompts.reading import BUILTIN_BENCHMARK, PromptSet, evenly_chosen, read_prompt_set
from rtdmd_cli.engine.rewards import shapes_clip
from rtdmd_cli.engine.rewards.registry import REWARDS
from rtdmd_cli.engine.rewards.shapes import ShapesGenEval
from rtdmd_cli.engine.roles.base import GENERATOR, RoleSet
from rtdmd_cli.engine.sampling.sample import Kind, decode_all, generate, sampling_plan
from rtdmd_cli.engine.training.previews import Previews
from rtdmd_cli.engine.training.trainer import Trainer
from rtdmd_cli.errors import DataError, EnvironmentFailure

BUILTIN = "builtin:shapes"
"""As `watch.features`: the package's CLIP that judges and is never trained on."""
STRICT, CLIP, DISTANCE = "previews/strict_score", "previews/clip_score", "previews/teacher_distance"


class HeldOut(Protocol):
    """What is measured with a grid."""

    def measure(self, core: Trainer, images: Tensor) -> dict[str, float]:
        """Figures of the EMA's weights, as names of a metric line. images: the grid's own, [n,3,H,W]."""
        ...


@dataclass(frozen=True)
class Nothing:
    """No figures."""

    def measure(self, core: Trainer, images: Tensor) -> dict[str, float]:
        """None."""
        return {}


@dataclass(frozen=True)
class StrictScore:
    """The built-in world's strict score on fixed captions. cond: a row for each of `prompts`."""

    preset: Preset
    prompts: PromptSet
    cond: Conditioning

    def measure(self, core: Trainer, images: Tensor) -> dict[str, float]:
        """The share of its own pictures, one of each caption, that show it; `images` don't enter."""
        keys = [(row, 0) for row in range(len(self.prompts))]
        drawn = draw(core, self.preset, "generator", self.cond, keys)
        scores = ShapesGenEval(soft=False).score(drawn, self.prompts.texts, self.prompts.metadata)
        return {STRICT: float(scores.mean())}


@dataclass(frozen=True)
class ClipFigures:
    """CLIP score and distance to the teacher. texts, teacher: features [n,D] of the prompts and the teacher's pictures."""

    source: str
    device: torch.device
    texts: Tensor
    teacher: Tensor

    @torch.no_grad()
    def measure(self, core: Trainer, images: Tensor) -> dict[str, float]:
        """Of the grid's pictures. The CLIP is loaded for it and freed afterwards."""
        features = open_clip(self.source, self.device).image_features(images).cpu()
        return {
            CLIP: float((features * self.texts).sum(-1).mean()),
            DISTANCE: float(1 - (features * self.teacher).sum(-1).mean()),
        }


def scored_prompts(preset: Preset) -> PromptSet:
    """The captions of the strict score, evenly spread over the held-out ones; none for other models than the built-in."""
    if preset.model.path not in BUILTIN_MODELS or not preset.previews.score_images:
        return PromptSet([], [])
    return evenly_chosen(read_prompt_set(BUILTIN_BENCHMARK), preset.previews.score_images)


def open_held_out(
    preset: Preset,
    previews: Previews,
    prompts: PromptSet,
    cond: Conditioning | None,
    backbone: Backbone,
    say: Callable[[str], None],
) -> HeldOut:
    """What a stage-1 run measures. prompts: of `scored_prompts`; cond: a row for each, None where there are none.

    A CLIP that is not to be had costs the figures and not the run, which needs it for nothing else; it is said.
    """
    if cond is not None:
        return StrictScore(preset, prompts, cond)
    source = preset.tune_reward.watch.features
    if source is None:
        return Nothing()
    say(f"loading the CLIP {source}, by which the sample grids are measured")
    try:
        clip = open_clip(source, backbone.device)
    except (DataError, EnvironmentFailure) as error:
        say(f"the sample grids are not measured: {error.message} {error.hint}")
        return Nothing()
    with torch.no_grad():
        texts = clip.text_features([each.prompt for each in previews.shown]).cpu()
        teacher = clip.image_features(previews.reference).cpu()
    return ClipFigures(source, backbone.device, texts, teacher)


def draw(
    core: Trainer, preset: Preset, kind: Kind, cond: Conditioning, keys: list[tuple[int, int]]
) -> Tensor:
    """Pictures [N,3,H,W] of the generator's EMA or of the teacher, from the evaluation's seed.

    keys: (prompt, picture); cond: a row for each prompt.
    """
    if not keys:
        return torch.empty(0)
    plan, batch = sampling_plan(kind, core.backbone, preset.model, preset.sampler), preset.evaluate.batch
    roles: RoleSet = core.roles
    with roles.swapped(GENERATOR, core.ema):
        latents = generate(
            core.backbone,
            roles,
            plan,
            cond,
            core.empty,
            keys,
            shape=core.shape,
            seed=preset.evaluate.seed,
            batch=batch,
        )
    return decode_all(core.backbone, latents, batch)


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

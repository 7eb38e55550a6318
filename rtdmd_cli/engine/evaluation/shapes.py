"""The benchmark `shapes`: 553 held-out prompts of the built-in world, its detector, the strict GenEval rule.

Beside the score, where the judge's weights are there: the CLIP score of an independent CLIP that nothing is
trained on, and the Frechet distance of its picture features to rendered pictures of the same captions.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rtdmd_cli import __version__
from rtdmd_cli.engine.evaluation.features import (
    ClipScorer,
    frechet_distance,
    mean_pairwise_cosine_distance,
)
from rtdmd_cli.engine.evaluation.geneval import Verdict, judge, task_scores
from rtdmd_cli.engine.evaluation.report_stats import bootstrap_overall
from rtdmd_cli.engine.model_source import Model
from rtdmd_cli.engine.pictures import DTYPE_NAMES, batched, encode, paint
from rtdmd_cli.engine.sample import SamplingPlan
from rtdmd_cli.errors import DataError
from rtdmd_cli.shapes.detector import COUNTING_THRESHOLD, THRESHOLD, detect
from rtdmd_cli.shapes.grammar import TASKS, Caption, requirement, scene_for
from rtdmd_cli.shapes.prompts import benchmark, benchmark_facts
from rtdmd_cli.shapes.render import PICTURE, render

NAME = "shapes"
JUDGE_BATCH = 256  # pictures
RENDER_SEEDS = (
    0,
    1,
)  # of the pictures that the Frechet distance compares with, and of those that show its floor
COMMON_FAILURES = 10

Key = tuple[int, int]  # prompt index in the benchmark, picture index


@dataclass(frozen=True)
class Judged:
    """One picture's verdict."""

    key: Key
    caption: Caption
    verdict: Verdict

    def record(self) -> dict[str, Any]:
        """As a line of results.json."""
        return {
            "prompt_index": self.key[0],
            "image_index": self.key[1],
            "tag": self.caption.task,
            "prompt": self.caption.text,
            "correct": self.verdict.correct,
            "reasons": self.verdict.reasons,
        }


@dataclass(frozen=True)
class ShapesResult:
    """What an evaluation found. summary: JSON values; pictures: [N,3,32,32] in 0..1, ordered as `judged`."""

    summary: dict[str, Any]
    judged: list[Judged]
    pictures: Tensor


def chosen_prompts(limit: int | None) -> list[int]:
    """Benchmark indices: all 553, or `limit` evenly spread ones; from 6 on every task has some."""
    count = len(benchmark())
    if limit is None or limit >= count:
        return list(range(count))
    return [number * count // limit for number in range(limit)]


def open_judge(device: torch.device) -> ClipScorer | None:
    """The independent CLIP of the package; None where it isn't part of it. Errors as `ClipScorer.load`."""
    folder = Path(str(files("rtdmd_cli"))) / "shapes/weights/clip-judge"
    return ClipScorer.load(folder, device) if folder.is_dir() else None


def evaluate(
    model: Model,
    plan: SamplingPlan,
    judge_clip: ClipScorer | None,
    *,
    images_per_prompt: int,
    limit: int | None,
    seed: int,
    batch: int,
    on_pictures: Callable[[int], None],
) -> ShapesResult:
    """Sample the benchmark and judge it; noise is keyed by (seed, prompt index, picture index).

    on_pictures: told the number of pictures after each batch. DataError for a model of another picture size;
    other errors as `paint`.
    """
    size = model.source.preset.model.resolution
    if size != PICTURE:
        raise DataError(
            f"The benchmark `shapes` reads pictures of {PICTURE} px; {model.label} makes {size} px.",
            "It is for models of the built-in world.",
        )
    began = time.monotonic()
    keys = [(prompt, image) for prompt in chosen_prompts(limit) for image in range(images_per_prompt)]
    cond, uncond = encode(model.backbone, [caption.text for caption in benchmark()], plan)
    shape = model.backbone.latent_shape(PICTURE, PICTURE)
    parts, painting = [], time.monotonic()
    for part in batched(keys, batch):
        parts.append(paint(model, plan, cond, uncond, part, shape=shape, seed=seed))
        on_pictures(len(part))
    pictures, painted = torch.cat(parts), time.monotonic()
    captions = [benchmark()[prompt] for prompt, _ in keys]
    verdicts = judge_pictures(pictures.numpy(), captions)
    judged = [Judged(*each) for each in zip(keys, captions, verdicts, strict=True)]
    summary = scores(judged)
    summary["clip"] = clip_figures(judge_clip, pictures, judged) if judge_clip else None
    summary |= _conditions(model, plan, seed, images_per_prompt, limit)
    summary["seconds_per_picture"] = (painted - painting) / len(keys)
    summary["seconds"] = time.monotonic() - began
    return ShapesResult(summary, judged, pictures)


def _conditions(
    model: Model, plan: SamplingPlan, seed: int, images_per_prompt: int, limit: int | None
) -> dict[str, Any]:
    """How the pictures were made; `limit` only where one was given."""
    conditions = {
        "model": model.label,
        "model_hash": model.model_hash,
        "kind": plan.kind,
        "steps": plan.steps,
        "evaluations": plan.evaluations,
        "guidance": plan.guidance,
        "eta": plan.eta,
        "seed": seed,
        "images_per_prompt": images_per_prompt,
        "dtype": DTYPE_NAMES[model.backbone.dtype],
        "device": model.backbone.device.type,
        "version": __version__,
    }
    return conditions if limit is None else conditions | {"limit": limit}


def judge_pictures(pictures: NDArray[np.floating], captions: Sequence[Caption]) -> list[Verdict]:
    """The strict verdict on each picture [N,3,32,32] in 0..1; counting has its own detector threshold."""
    verdicts: dict[int, Verdict] = {}
    for counting, threshold in ((False, THRESHOLD), (True, COUNTING_THRESHOLD)):
        rows = [row for row, caption in enumerate(captions) if (caption.task == "counting") == counting]
        for part in batched(rows, JUDGE_BATCH):
            for row, found in zip(part, detect(pictures[list(part)], threshold), strict=True):
                verdicts[row] = judge(found, requirement(captions[row]))
    return [verdicts[row] for row in range(len(captions))]


def scores(judged: Sequence[Judged]) -> dict[str, Any]:
    """Strict accuracies in 0..1, the 95% interval of their mean, and what failed most.

    tasks: six accuracies, None for a task without a prompt. overall: the mean of the others.
    """
    result = task_scores({"tag": each.caption.task, "correct": each.verdict.correct} for each in judged)
    by_prompt: dict[str, dict[int, list[bool]]] = {}
    for each in judged:
        prompts = by_prompt.setdefault(each.caption.task, {})
        prompts.setdefault(each.key[0], []).append(each.verdict.correct)
    means = {
        task: [sum(marks) / len(marks) for marks in prompts.values()] for task, prompts in by_prompt.items()
    }
    interval = bootstrap_overall(means)
    counts = Counter(reason for each in judged for reason in each.verdict.reasons)
    facts = benchmark_facts()
    return {
        "benchmark": NAME,
        "overall": result.overall,
        "interval": [interval.low, interval.high],
        "tasks": {task: result.tasks[task] for task in TASKS},
        "prompts": {task: {**facts[task], "evaluated": len(means.get(task, []))} for task in TASKS},
        "images": len(judged),
        "failures": [{"reason": reason, "pictures": n} for reason, n in counts.most_common(COMMON_FAILURES)],
    }


@torch.no_grad()
def clip_figures(clip: ClipScorer, pictures: Tensor, judged: Sequence[Judged]) -> dict[str, Any]:
    """Mean CLIP score (cosine), and the Frechet distance to as many rendered pictures of the same captions.

    The distance between two sets of rendered pictures is its floor at this number of pictures. Distances are
    None for fewer than two pictures. diversity: mean cosine distance of two pictures of a prompt; None where
    every prompt has one.
    """
    features = _features(clip, pictures)
    texts = clip.text_features([each.caption.text for each in judged]).cpu()
    real, other = (_features(clip, rendered(judged, seed)) for seed in RENDER_SEEDS)
    enough, prompts = len(judged) > 1, [each.key[0] for each in judged]
    several = len(set(prompts)) < len(prompts)
    return {
        "score": float((features * texts).sum(-1).mean()),
        "score_of_rendered": float((real * texts).sum(-1).mean()),
        "frechet": frechet_distance(features, real) if enough else None,
        "frechet_floor": frechet_distance(other, real) if enough else None,
        "frechet_pictures": [len(features), len(real)],
        "diversity": mean_pairwise_cosine_distance(features, prompts) if several else None,
    }


def _features(clip: ClipScorer, pictures: Tensor) -> Tensor:
    return torch.cat([clip.image_features(part).cpu() for part in pictures.split(JUDGE_BATCH)])


def rendered(judged: Sequence[Judged], seed: int) -> Tensor:
    """A rendered picture of each caption: [N,3,32,32] in 0..1, fixed by seed, prompt and picture index."""
    scenes = [scene_for(each.caption, np.random.default_rng([seed, *each.key])) for each in judged]
    return torch.from_numpy(np.stack([render(scene) for scene in scenes])).clamp(0, 1)

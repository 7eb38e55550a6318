"""The benchmark `shapes`: 553 held-out prompts of the built-in world, its detector, the strict GenEval rule.

Beside the score: how often there are more objects than asked for, and, where the judge's weights are there, the CLIP
score of an independent CLIP that nothing is trained on, with the Frechet distance of its picture features to rendered
pictures of the same captions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rtdmd_cli.engine.evaluation.intervals import bootstrap_overall
from rtdmd_cli.engine.judges.features import ClipScorer, frechet_distance, mean_pairwise_cosine_distance
from rtdmd_cli.engine.judges.geneval import Verdict, judge, task_scores
from rtdmd_cli.engine.sampling.pictures import batched
from rtdmd_cli.shapes.detector import COUNTING_THRESHOLD, THRESHOLD, detect
from rtdmd_cli.shapes.grammar import TASKS, Caption, parse, requirement, scene_for
from rtdmd_cli.shapes.prompts import benchmark, benchmark_facts
from rtdmd_cli.shapes.render import render

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

    @classmethod
    def of(cls, key: Key, prompt: str, correct: bool, reasons: Sequence[str]) -> Judged:
        """prompt: a caption of the world, such as the benchmark's."""
        known = benchmark()
        same = key[0] < len(known) and known[key[0]].text == prompt
        return cls(key, known[key[0]] if same else parse(prompt), Verdict(correct, list(reasons)))


def open_judge(device: torch.device) -> ClipScorer | None:
    """The independent CLIP of the package; None where the package lacks it. Errors as `ClipScorer.load`."""
    folder = Path(str(files("rtdmd_cli"))) / "shapes/weights/clip-judge"
    return ClipScorer.load(folder, device) if folder.is_dir() else None


def judge_pictures(pictures: NDArray[np.floating], captions: Sequence[Caption]) -> list[Verdict]:
    """The strict verdict on each picture [N,3,32,32] in 0..1; counting has its own detector threshold."""
    verdicts: dict[int, Verdict] = {}
    for counting, threshold in ((False, THRESHOLD), (True, COUNTING_THRESHOLD)):
        rows = [row for row, caption in enumerate(captions) if (caption.task == "counting") == counting]
        for part in batched(rows, JUDGE_BATCH):
            for row, found in zip(part, detect(pictures[list(part)], threshold), strict=True):
                verdicts[row] = judge(found, requirement(captions[row]))
    return [verdicts[row] for row in range(len(captions))]


def extra_objects(pictures: NDArray[np.floating], captions: Sequence[Caption]) -> float:
    """Share in 0..1 of pictures [N,3,32,32] in which more objects are found than the caption asks for.

    GenEval's strict rule lets them pass, except in counting, where only those of the class asked for count.
    """
    wanted = [sum(thing.count for thing in caption.things) for caption in captions]
    more = 0
    for part in batched(range(len(wanted)), JUDGE_BATCH):
        for row, found in zip(part, detect(pictures[list(part)], THRESHOLD), strict=True):
            more += len(found) > wanted[row]
    return more / len(wanted)


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

"""What the stock samplers cost a generator of the built-in world: its score with Euler (eta 0), CPS with the run's own
eta, and full renoising (eta 1, `stochastic_sampling=True` of the stock scheduler).

    python scripts/sampler_modes.py runs/shapes-4step --seeds 0 1000 2000

One JSON line a cell on stdout: eta, seed, strict score, the six tasks, and the independent judge's CLIP score.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rtdmd_cli.engine.evaluation.prompts import spread
from rtdmd_cli.engine.evaluation.shapes import Judged, clip_figures, judge_pictures, open_judge, scores
from rtdmd_cli.engine.judges.features import ClipScorer
from rtdmd_cli.engine.sampling.model import Model, open_model
from rtdmd_cli.engine.sampling.pictures import batched, encode, paint
from rtdmd_cli.engine.sampling.sample import SamplingPlan
from rtdmd_cli.engine.sampling.source import resolve
from rtdmd_cli.shapes.prompts import benchmark
from rtdmd_cli.shapes.render import PICTURE

BATCH = 64  # pictures


def main() -> None:
    """Evaluate every pair of eta and seed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("run", help="run, checkpoint or exported folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=int, help="only so many prompts")
    given = parser.parse_args()
    cpu = torch.device("cpu")
    model = open_model(resolve(given.run, Path("runs")), cpu, torch.float32)
    plan, judge = model.plan(), open_judge(cpu)
    for seed in given.seeds:
        for eta in sorted({0.0, plan.eta, 1.0}):
            found = {
                "eta": eta,
                "seed": seed,
                **measure(model, replace(plan, eta=eta), judge, seed, given.limit),
            }
            print(json.dumps(found), flush=True)


def measure(
    model: Model, plan: SamplingPlan, judge: ClipScorer | None, seed: int, limit: int | None
) -> dict[str, Any]:
    """Strict score, tasks and the judge's CLIP score of one picture of each prompt."""
    keys = [(prompt, 0) for prompt in spread(len(benchmark()), limit)]
    captions = [benchmark()[prompt] for prompt, _ in keys]
    cond, uncond = encode(model, [caption.text for caption in benchmark()], plan)
    shape = model.backbone.latent_shape(PICTURE, PICTURE)
    pictures = torch.cat(
        [paint(model, plan, cond, uncond, part, shape=shape, seed=seed) for part in batched(keys, BATCH)]
    )
    verdicts = judge_pictures(pictures.numpy(), captions)
    judged = [Judged(*each) for each in zip(keys, captions, verdicts, strict=True)]
    found = scores(judged)
    clip = clip_figures(judge, pictures, judged)["score"] if judge else None
    return {"overall": found["overall"], "tasks": found["tasks"], "clip": clip}


if __name__ == "__main__":
    main()

"""What the stock samplers cost a generator of the built-in world: its score with Euler (eta 0), CPS with the run's own
eta, and full renoising (eta 1, `stochastic_sampling=True` of the stock scheduler).

    python scripts/sampler_modes.py runs/shapes-4step --seeds 0 1000 2000

One JSON line a cell on stdout: eta, seed, strict score, its interval, and the six tasks. The pictures of eta 0.9 are
those of `rtdmd eval shapes` with that seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rtdmd_cli.engine.evaluation.shapes import Judged, judge_pictures, scores
from rtdmd_cli.engine.model_source import Model, open_model, resolve
from rtdmd_cli.engine.pictures import batched, encode, paint
from rtdmd_cli.engine.sample import SamplingPlan
from rtdmd_cli.shapes.prompts import benchmark
from rtdmd_cli.shapes.render import PICTURE

BATCH = 64


def measure(model: Model, plan: SamplingPlan, chosen: Sequence[int], seed: int) -> dict[str, Any]:
    """The strict scores of one picture each of these prompts of the benchmark."""
    captions = benchmark()
    cond, uncond = encode(model.backbone, [caption.text for caption in captions], plan)
    shape = model.backbone.latent_shape(PICTURE, PICTURE)
    keys = [(prompt, 0) for prompt in chosen]
    parts = [paint(model, plan, cond, uncond, part, shape=shape, seed=seed) for part in batched(keys, BATCH)]
    asked = [captions[prompt] for prompt in chosen]
    verdicts = judge_pictures(torch.cat(parts).numpy(), asked)
    return scores([Judged(*each) for each in zip(keys, asked, verdicts, strict=True)])


def main() -> None:
    """Measure every pair of eta and seed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("run", help="run, checkpoint or exported folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=int, help="only so many prompts, evenly spread")
    given = parser.parse_args()
    model = open_model(resolve(given.run, Path("runs")), torch.device("cpu"), torch.float32)
    plan, every = model.plan(), len(benchmark())
    count = min(given.limit or every, every)
    chosen = [number * every // count for number in range(count)]
    for seed in given.seeds:
        for eta in sorted({0.0, plan.eta, 1.0}):
            found = measure(model, replace(plan, eta=eta), chosen, seed)
            figures = {key: found[key] for key in ("overall", "interval", "tasks")}
            print(json.dumps({"eta": eta, "seed": seed} | figures), flush=True)


if __name__ == "__main__":
    main()

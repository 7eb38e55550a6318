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

import torch

from rtdmd_cli.engine.evaluation.shapes import evaluate, open_judge
from rtdmd_cli.engine.model_source import open_model, resolve


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
            summary = evaluate(
                model,
                replace(plan, eta=eta),
                judge,
                images_per_prompt=1,
                limit=given.limit,
                seed=seed,
                batch=64,
                on_pictures=lambda count: None,
            ).summary
            found = {key: summary[key] for key in ("eta", "seed", "overall", "tasks")}
            print(json.dumps(found | {"clip": summary["clip"] and summary["clip"]["score"]}), flush=True)


if __name__ == "__main__":
    main()

"""Presets and run folders of the tiny model, as `rtdmd distill` leaves them, for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.engine.backbones.layout import folder_hash
from rtdmd_cli.engine.backbones.sd3 import LAYOUT
from rtdmd_cli.engine.roles.adapters import Roles
from rtdmd_cli.engine.roles.base import GENERATOR
from rtdmd_cli.engine.storage.checkpoint import save_checkpoint
from rtdmd_cli.engine.storage.run_folder import RunFolder, State, create_run
from tests.tiny_models import RESOLUTION, TEXT_LENGTH, build_transformer, sd3_folder

RANK = 2


def write_preset(path: Path, resolution: int = RESOLUTION) -> Path:
    """A preset file on the tiny model."""
    lines = ["model:", "  family: sd3", f"  path: {sd3_folder()}", f"  resolution: {resolution}"]
    lines += [f"  text_length: {TEXT_LENGTH}", "  guidance: 4.0", "  teacher_steps: 6"]
    lines += ["distill:", f"  lora: {{rank: {RANK}, alpha: 4}}", "evaluate:", "  batch: 16"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def generator_weights(seed: int, rank: int = RANK) -> dict[str, Tensor]:
    """Random weights of the generator's adapter, large enough to change every picture."""
    preset = load_preset("shapes-4step", [f"distill.lora.rank={rank}", "distill.train=lora"], {}).preset
    roles = Roles(build_transformer(), preset.distill.lora, seed)
    random = torch.Generator().manual_seed(seed)
    return {
        name: 0.1 * torch.randn(parameter.shape, generator=random)
        for name, parameter in roles.named_parameters(GENERATOR)
    }


def add_checkpoint(
    run: RunFolder, step: int, weights: dict[str, Tensor], base_hash: str | None = None
) -> Path:
    """Save a checkpoint whose EMA is `weights`, and whose raw generator and fake score are something else."""
    tensors = {"ema": weights, "generator": {name: -tensor for name, tensor in weights.items()}}
    tensors["fake"] = {name: tensor.flip(0) for name, tensor in weights.items()}
    meta = {"base_hash": base_hash or folder_hash(LAYOUT, sd3_folder())}
    return save_checkpoint(run.checkpoints, step, tensors, {"stage": "distill"}, 3, meta)


def make_run(
    out: Path,
    name: str,
    steps: tuple[int, ...] = (10,),
    state: State = "finished",
    stage: str = "distill",
    begun_from: Path | None = None,
) -> RunFolder:
    """A run with a checkpoint for each of `steps`, its EMA drawn from the step."""
    out.mkdir(parents=True, exist_ok=True)
    preset = write_preset(out / f".{name}.yaml")
    resolved, cpu = load_preset(str(preset), environ={}), torch.device("cpu")
    run = create_run(out, name, resolved, ["rtdmd"], cpu, stage, begun_from)
    for step in steps:
        add_checkpoint(run, step, generator_weights(step))
    run.set_status(state)
    return run

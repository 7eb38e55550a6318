"""Finished runs of either stage on any small model, with random adapters, for tests of the export."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.engine.backbones.families import load_backbone
from rtdmd_cli.engine.roles.adapters import Roles
from rtdmd_cli.engine.roles.base import GENERATOR, STAGE1_GENERATOR
from rtdmd_cli.engine.storage.checkpoint import save_checkpoint
from rtdmd_cli.engine.storage.run_folder import RunFolder, create_run
from tests.tiny_flux import TINY, tiny_folder

RANK, FRESH_RANK = 2, 3  # of stage 1's adapters and of stage 2's
REWARDS = ("shapes-clip", "shapes-clip-heldout")
CPU = torch.device("cpu")


def write_preset(path: Path, name: str = "sd3", base: str = "", model: str = "", more: str = "") -> Path:
    """A preset on a small model. base: instead of its folder; model: further keys; more: further sections."""
    tiny = TINY[name]
    keys = f"family: {tiny.family}, path: {base or tiny_folder(name)}, resolution: 32, "
    keys += f"text_length: {tiny.text_length}, guidance: {tiny.guidance}, teacher_steps: 2{model}"
    targets = f"targets: [{tiny.targets}]"
    path.write_text(
        f"model: {{{keys}}}\n"
        f"distill: {{prompts: secret/train.txt, lora: {{rank: {RANK}, alpha: 4, {targets}}}}}\n"
        "tune_reward: {rewards: [shapes-clip], held_out: [shapes-clip-heldout], "
        f"lora: {{rank: {FRESH_RANK}, alpha: 2, {targets}}}}}\n{more}",
        encoding="utf-8",
    )
    return path


def make_run(preset_file: Path, out: Path, name: str, tuned: bool = False, size: float = 0.1) -> RunFolder:
    """A finished run of stage 1 or 2 whose adapters (or weights) are random; size: their standard deviation."""
    resolved = load_preset(str(preset_file), environ={})
    preset = resolved.preset
    backbone = load_backbone(preset.model, CPU, torch.float32)
    lora, full = preset.distill.lora, preset.distill.train == "full"
    roles = None if full else Roles(backbone.transformer, lora, 0, preset.tune_reward.lora if tuned else None)
    random = torch.Generator().manual_seed(7)

    def weights(adapter: str) -> dict[str, Tensor]:
        """Of a full training: the base's weights moved a little."""
        if roles is None:
            named, start = backbone.transformer.named_parameters(), 1.0
        else:
            named, start = iter(roles.named_parameters(adapter)), 0.0
        return {
            key: start * parameter.detach() + size * torch.randn(parameter.shape, generator=random)
            for key, parameter in named
        }

    tensors = {"ema": weights(GENERATOR)}
    stage = "tune-reward" if tuned else "distill"
    state: dict[str, object] = {"stage": stage, "records": {}}
    if tuned:
        tensors["stage1_generator"] = weights(STAGE1_GENERATOR)
        state["records"] = {"rewards_before": dict.fromkeys(REWARDS, 0.25)}
    tensors["generator"] = {key: -tensor for key, tensor in tensors["ema"].items()}
    run = create_run(out, name, resolved, ["rtdmd"], CPU, stage)
    meta = {"base_hash": backbone.model_id.hash, "preset_sha256": resolved.sha256}
    save_checkpoint(run.checkpoints, 20, tensors, state, 3, meta)
    run.set_status("finished", iteration=20, **({"measured": dict.fromkeys(REWARDS, 0.5)} if tuned else {}))
    return run

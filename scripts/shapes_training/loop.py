"""The loop that all stages share: schedule, log, and a state on disk from which training goes on."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rtdmd_cli.engine.storage.files import write_text, write_with
from rtdmd_cli.errors import DataError


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine to 1% of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(steps - warmup, 1)
    return peak * (0.01 + 0.99 * 0.5 * (1 + float(torch.cos(torch.tensor(share * torch.pi)))))


def muon_and_adamw(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices of transformer blocks and encoders, AdamW for all else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        hidden = parameter.ndim == 2 and (
            "transformer_blocks" in name or "layers." in name or "block." in name
        )
        (matrices if hidden and "norm1" not in name and "relative" not in name else others).append(parameter)
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)]


def save_state(
    folder: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    extra: dict[str, Tensor],
    step: int,
) -> None:
    """Write weights, optimiser tensors and extra tensors, then the step that they belong to."""
    tensors = {
        f"model/{k}": v.detach().clone(memory_format=torch.contiguous_format)
        for k, v in model.state_dict().items()
    }
    tensors |= {f"extra/{k}": v.contiguous() for k, v in extra.items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{index}/{k}": v.contiguous() for k, v in state.items()}
    write_with(folder / f"state-{step}.safetensors", lambda path: save_file(tensors, path))
    write_text(folder / "step.json", json.dumps({"step": step}))
    for old in folder.glob("state-*.safetensors"):
        if old.name != f"state-{step}.safetensors":
            old.unlink()


def read_weights(folder: Path, part: str = "model") -> tuple[int, dict[str, Tensor]]:
    """The step of the saved state, and its weights: "model" as the optimiser left them, "extra" the averages.

    Raises:
        DataError: the folder holds no state.
    """
    if not (folder / "step.json").exists():
        raise DataError(f"{folder} holds no trained state.", f"Run the stage {folder.name} first.")
    step = int(json.loads((folder / "step.json").read_text())["step"])
    tensors = load_file(folder / f"state-{step}.safetensors")
    return step, {k.removeprefix(f"{part}/"): v for k, v in tensors.items() if k.startswith(f"{part}/")}


def load_state(
    folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], extra: dict[str, Tensor]
) -> int:
    """Restore what `save_state` wrote; returns the step, 0 where there is no state."""
    if not (folder / "step.json").exists():
        return 0
    step = int(json.loads((folder / "step.json").read_text())["step"])
    tensors = load_file(folder / f"state-{step}.safetensors")
    model.load_state_dict({k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")})
    for key, value in extra.items():
        value.copy_(tensors[f"extra/{key}"])
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(f"optimizer/{number}/"):
                index, key = name.split("/")[2:]
                state.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


def run(
    folder: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    update: Callable[[int], dict[str, float]],
    steps: int,
    warmup: int = 200,
    extra: dict[str, Tensor] | None = None,
    save_every: int = 500,
    report: Callable[[int], None] | None = None,
) -> None:
    """Call `update(step)` (forward, backward, optimiser step; returns figures to log) until `steps` are done.

    Every optimiser's learning rate follows `learning_rate` relative to the one it was made with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    extra = extra or {}
    rank = dist.get_rank() if dist.is_initialized() else 0
    start = load_state(folder, model, optimizers, extra)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    clock, since = time.monotonic(), start
    for step in range(start, steps):
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = learning_rate(step, steps, peak, warmup)
        figures = update(step)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            speed = (step + 1 - since) / (time.monotonic() - clock)
            text = " ".join(f"{k} {v:.4f}" for k, v in figures.items())
            left = (steps - step - 1) / speed / 60
            if rank == 0:
                print(
                    f"{folder.name} {step + 1}/{steps} {text} | {speed:.1f} it/s, {left:.1f} min left",
                    flush=True,
                )
            clock, since = time.monotonic(), step + 1
        if rank == 0 and ((step + 1) % save_every == 0 or step + 1 == steps):
            save_state(folder, model, optimizers, extra, step + 1)
            if report:
                report(step + 1)

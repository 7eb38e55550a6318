"""A checkpoint put back into a trainer, and what has to fit before."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from rtdmd_cli.engine.compute import optim
from rtdmd_cli.engine.roles.base import RoleSet, require_fit
from rtdmd_cli.engine.storage.checkpoint import (
    Checkpoint,
)
from rtdmd_cli.engine.training.start import Start
from rtdmd_cli.engine.training.trainer import ROLES, Trainer, optimizer_of
from rtdmd_cli.errors import DataError

STATE_KEYS = {"stage", "generator_updates", "optimizers", "seconds", "records"}
DTYPE = "hardware.dtype"
OTHER_HINT = "Resume from another checkpoint, or start another run with --name OTHER."


def groups(frozen: tuple[str, ...]) -> set[str]:
    """Names of a checkpoint's groups of tensors."""
    return {"ema", *ROLES, *frozen, *(f"optimizer_{role}" for role in ROLES)}


def restore(trainer: Trainer, checkpoint: Checkpoint, stage: str, frozen: tuple[str, ...] = ()) -> None:
    """Put a checkpoint's weights, optimiser states and EMA into a trainer; DataError if one doesn't fit."""
    if checkpoint.tensors.keys() != groups(frozen) or STATE_KEYS - {"records"} - checkpoint.state.keys():
        raise DataError(f"{checkpoint.path} is no full checkpoint of rtdmd {stage}.", OTHER_HINT)
    require_base(trainer, checkpoint)
    for adapter in frozen:
        trainer.roles.load(adapter, checkpoint.tensors[adapter])
    trainer.ema = checked_average(trainer.roles, checkpoint.tensors["ema"])
    for role in ROLES:
        trainer.roles.load(role, checkpoint.tensors[role])
        names = [name for name, _ in trainer.roles.named_parameters(role)]
        group = checkpoint.tensors[f"optimizer_{role}"]
        optim.load_optimizer(optimizer_of(trainer, role), names, group, checkpoint.state["optimizers"][role])
    trainer.generator_updates = checkpoint.state["generator_updates"]
    checkpoint.release()


def accepted(start: Start, dtype: torch.dtype) -> Start:
    """`start`, with a change of the base's dtype noted, which `auto` may bring on another machine.

    DataError where that is not allowed.
    """
    now = str(dtype).removeprefix("torch.")
    before = start.checkpoint.meta.get("dtype", now) if start.checkpoint else now
    if start.checkpoint is None or before == now or DTYPE in {key for key, _, _ in start.changes}:
        return start
    if DTYPE not in start.allowed:
        raise DataError(
            f"{start.checkpoint.path} was trained on the base model in {before}, now it is in {now}.",
            f"Give --dtype as before, or accept it: --allow-change {DTYPE}",
        )
    return replace(start, changes=(*start.changes, (DTYPE, before, now)))


def require_base(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Raise DataError if a checkpoint was made on other weights of the base model."""
    base, made_on = trainer.backbone.model_id, checkpoint.meta.get("base_hash")
    if made_on != base.hash:
        raise DataError(f"{checkpoint.path} was trained on another version of {base.path}.", OTHER_HINT)


def checked_average(roles: RoleSet, ema: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy of an EMA on the model's device; DataError if a name, shape or format differs."""
    own = dict(roles.named_parameters("generator"))
    require_fit("generator", own, ema)
    return {name: ema[name].to(parameter.device, copy=True) for name, parameter in own.items()}

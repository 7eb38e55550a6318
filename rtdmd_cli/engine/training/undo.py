"""An iteration as if it had not begun: what moved in it is put back, bit by bit."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rtdmd_cli.engine.compute.allocator import on_wsl
from rtdmd_cli.engine.compute.device import wait
from rtdmd_cli.engine.roles.base import GENERATOR
from rtdmd_cli.engine.training.trainer import ROLES, Trainer, optimizer_of
from rtdmd_cli.errors import is_out_of_memory

QUEUED = 4 * 2**30
"""Bytes of a role that are copied behind the device's work, without a stop for each tensor. Such copies go into memory that
the system can't use otherwise, and of which WSL has little; of more, as where every weight is trained, each is waited for."""


@dataclass(frozen=True)
class Kept:
    """A role before it moved: weights, each weight's optimiser state, and of the generator the average.

    On the host; there once the device has been waited for.
    """

    weights: list[Tensor]
    states: list[dict[str, Any]]
    average: Mapping[str, Tensor]


class Undo:
    """Remembers the roles of one iteration from the moment before each moves. A role that stays costs nothing.

    What is kept lies in the host's memory: three times the trained weights of the roles that move, for the iteration.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._kept: dict[str, Kept] = {}
        self._updates = 0

    def begin(self) -> None:
        """A new iteration: what has happened before is not undone."""
        self._kept.clear()
        self._updates = self._trainer.generator_updates
        self._trainer.before_move = self._keep

    @torch.no_grad()
    def _keep(self, role: str) -> None:
        trainer, optimizer = self._trainer, optimizer_of(self._trainer, role)
        parameters = [parameter for _, parameter in trainer.roles.named_parameters(role)]
        average = trainer.ema if role == GENERATOR else {}
        states = [optimizer.state[parameter] for parameter in parameters]
        values = [*parameters, *average.values(), *(value for state in states for value in state.values())]
        device = trainer.backbone.device
        on_cpu = [value.device.type == "cpu" for value in values if isinstance(value, Tensor)]
        if device.type != "cpu" and any(on_cpu):  # paged states: the host's to read when no kernel uses them
            wait(device)
        keep = partial(_on_host, queued=_bytes(values) <= QUEUED and not on_wsl())
        self._kept[role] = Kept(
            [keep(parameter) for parameter in parameters],
            [{key: keep(value) for key, value in state.items()} for state in states],
            {name: keep(tensor) for name, tensor in average.items()},
        )

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back as it was at `begin`, and free the gradients."""
        trainer = self._trainer
        wait(trainer.backbone.device)
        for role in ROLES:
            optimizer = optimizer_of(trainer, role)
            optimizer.zero_grad(set_to_none=True)
            if role not in self._kept:
                continue
            kept = self._kept[role]
            parameters = [parameter for _, parameter in trainer.roles.named_parameters(role)]
            for parameter, weight, state in zip(parameters, kept.weights, kept.states, strict=True):
                parameter.copy_(weight)
                _put_back(optimizer.state[parameter], state)
            for name, tensor in kept.average.items():
                trainer.ema[name].copy_(tensor)
        trainer.generator_updates = self._updates
        self._kept.clear()


def _bytes(values: Iterable[Any]) -> int:
    """Of the tensors among them."""
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def _on_host(value: Any, queued: bool) -> Any:
    """A copy of a tensor on the CPU; other values, numbers say, as they are. queued: it is there only after `wait`.

    The memory of a queued copy must stay in place, of which a system may give little: then this one is waited for.
    """
    if not isinstance(value, Tensor):
        return value
    if queued:
        try:
            return value.detach().to("cpu", copy=True, non_blocking=True)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
    return value.detach().to("cpu", copy=True)


def _put_back(state: dict[str, Any], kept: dict[str, Any]) -> None:
    """Make an optimiser's state what it was, in its own tensors; what has come since is dropped."""
    for key in state.keys() - kept.keys():
        del state[key]
    for key, value in kept.items():
        if isinstance(value, Tensor):
            state[key].copy_(value)
        else:
            state[key] = value

"""The network's evaluations of a step and nothing else: recorded from a real step, run again on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rtdmd_cli.engine.training.trainer import Trainer


@dataclass(frozen=True)
class Evaluation:
    """One forward pass: the role, whether it is trained, the inputs, and which gradients a backward pass is to give."""

    role: str
    train: bool
    inputs: dict[str, Any]
    gradient: bool
    to_input: bool


def recorded(trainer: Trainer, step: Callable[[int], None], number: int) -> list[Evaluation]:
    """The evaluations of step `number`, in order."""
    found: list[Evaluation] = []
    stack: list[tuple[str, bool]] = []
    enter = trainer.roles.role

    @contextmanager
    def role(name: str, train: bool = False) -> Iterator[None]:
        stack.append((name, train))
        try:
            with enter(name, train):
                yield
        finally:
            stack.pop()

    def note(module: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        assert not args and stack
        latent = inputs["hidden_states"]
        gradient = torch.is_grad_enabled() and (stack[-1][1] or latent.requires_grad)
        kept = {key: value.detach() if isinstance(value, Tensor) else value for key, value in inputs.items()}
        found.append(Evaluation(*stack[-1], kept, gradient, latent.requires_grad))

    trainer.roles.role = role  # type: ignore[method-assign]
    hook = trainer.backbone.transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        step(number)
    finally:
        hook.remove()
        trainer.roles.role = enter  # type: ignore[method-assign]
    return found


def replay(trainer: Trainer, evaluations: list[Evaluation]) -> None:
    """Run them again, with a backward pass for each that had one; nothing moves."""
    with trainer.precision():
        for each in evaluations:
            active: AbstractContextManager[None] = trainer.roles.role(each.role, each.train)
            with active, torch.set_grad_enabled(each.gradient):
                latent = each.inputs["hidden_states"].requires_grad_(each.to_input)
                out = trainer.backbone.transformer(**(each.inputs | {"hidden_states": latent}))[0]
                if each.gradient:
                    out.sum().backward()
    for role in ("fake", "generator"):
        for _, parameter in trainer.roles.named_parameters(role):
            parameter.grad = None

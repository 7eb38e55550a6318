"""The names of the roles, and the protocol that training uses, whether roles are adapters or full copies."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from rtdmd_cli.errors import DataError

TEACHER, FAKE, GENERATOR = "teacher", "fake", "generator"
START = "start"  # in stage 2: the generator that stage 1 left
STAGE1_FAKE, STAGE1_GENERATOR = "stage1_fake", "stage1_generator"


class RoleSet(Protocol):
    """What the recipes need of the roles, trained as adapters (`adapters.Roles`) or in full (`full.FullRoles`).

    frozen: the weights of stage 1 that stage 2 keeps, to be saved with every checkpoint.
    """

    frozen: tuple[str, ...]

    def role(self, name: str, train: bool = False) -> AbstractContextManager[None]: ...

    def swapped(self, name: str, tensors: Mapping[str, Tensor]) -> AbstractContextManager[None]: ...

    def begin_stage_2(self, generator: Mapping[str, Tensor], fake: Mapping[str, Tensor]) -> None: ...

    def named_parameters(self, name: str) -> list[tuple[str, nn.Parameter]]: ...

    def state(self, name: str) -> dict[str, Tensor]: ...

    def load(self, name: str, tensors: Mapping[str, Tensor]) -> None: ...


def require_fit(name: str, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """DataError, naming the first five problems, unless `tensors` have the names, shapes and number formats of `own`.

    A float32 average goes into bf16 adapters too, rounded: stage 2 keeps it so.
    """
    problems = [f"{key} is missing" for key in own if key not in tensors]
    problems += [f"{key} is unexpected" for key in tensors if key not in own]
    for key in (key for key in own if key in tensors):
        fits = tensors[key].dtype in (own[key].dtype, torch.float32)
        if tensors[key].shape != own[key].shape or not fits:
            found = f"{tensors[key].dtype} {list(tensors[key].shape)}"
            problems.append(f"{key} is {found} instead of {own[key].dtype} {list(own[key].shape)}")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if problems[5:] else "")
        raise DataError(
            f"These weights don't fit the adapter {name}: {shown}.",
            "Use weights made with the same model and the same distill.lora and distill.train settings.",
        )

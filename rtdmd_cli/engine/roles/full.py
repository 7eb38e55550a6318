"""Full-weight training: generator and fake score as whole copies of the base, behind the one transformer.

    stage 1   teacher = the base's own weights      fake, generator = float32 copies, both trained
    stage 2   the same, from stage 1's fake score and generator      start = stage 1's generator, frozen

The counterpart of `adapters.Roles` for `distill.train: full`; both are `base.RoleSet`. Entering a role puts its weights in
the place of the transformer's, by reference: nothing is copied, and a graph keeps the weights it was built with. As
there, **`backward` is called inside the context of the role that is trained**, because checkpointing recomputes
with whatever weights are in place.

On a bf16 base the copies stay float32, for an update of 3e-5 of a weight is lost in bf16's 8 bits; the products are
computed in bf16 (autocast). Each copy, its gradient and the average take 4 bytes a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rtdmd_cli.engine.backbones.two_bases import TwoBases, bases_of
from rtdmd_cli.engine.compute.mixed import cast_forward
from rtdmd_cli.engine.roles.base import FAKE, GENERATOR, STAGE1_GENERATOR, START, TEACHER, require_fit

Weights = dict[str, nn.Parameter]


class FullRoles:
    """Every weight of `transformer` for generator and fake score; outside every context the base's own are in place.

    Both start as the teacher; with `TwoBases` the generator starts as its own base, which is then given up. Freezes
    the base. transformer: a diffusers model, unquantised, no weight shared by two modules. tuning: for stage 2, with
    stage 1's generator as a third copy; `begin_stage_2` fills them.
    """

    def __init__(self, transformer: nn.Module, tuning: bool = False) -> None:
        self.transformer = transformer.requires_grad_(False)
        teacher, start = bases_of(transformer)[0], bases_of(transformer)[-1]
        self.frozen: tuple[str, ...] = (STAGE1_GENERATOR,) if tuning else ()
        self._slots = [
            (f"{prefix}.{key}" if prefix else key, module, key)
            for prefix, module in teacher.named_modules()
            for key, parameter in module.named_parameters(recurse=False)
        ]
        self._base: Weights = {name: module.get_parameter(key) for name, module, key in self._slots}
        self._dtype = next(iter(self._base.values())).dtype
        self._weights = {
            name: _copy(teacher if name == FAKE else start) for name in (GENERATOR, FAKE, *self.frozen)
        }
        if isinstance(transformer, TwoBases):
            transformer.generator = teacher  # whatever computes, computes here
        cast_forward(teacher, self._precision)

    def _of(self, role: str) -> Weights:
        return self._base if role == TEACHER else self._weights[STAGE1_GENERATOR if role == START else role]

    @contextmanager
    def role(self, name: str, train: bool = False) -> Iterator[None]:
        """Put exactly this role's weights in place; they require a gradient only if `train`.

        Contexts nest. On leaving, weights and every `requires_grad` are as before.
        """
        weights = self._of(name)
        assert not (train and name not in (GENERATOR, FAKE)), name
        before = [module._parameters[key] for _, module, key in self._slots]
        flags = [parameter.requires_grad for parameter in weights.values()]
        try:
            self._put(weights.values())
            _require(weights, [train] * len(flags))
            yield
        finally:
            self._put(before)
            _require(weights, flags)

    def _precision(self) -> torch.dtype | None:
        """The dtype of products in the transformer's forward pass: the base's where the weights in place are float32."""
        mixed = next(self.transformer.parameters()).dtype != self._dtype
        return self._dtype if mixed else None

    def _put(self, parameters: Iterable[nn.Parameter | None]) -> None:
        """Put parameters in place, in the order of the slots, without `Module.__setattr__` and its look-up of each kind."""
        for (_, module, key), parameter in zip(self._slots, parameters, strict=True):
            module._parameters[key] = parameter

    @contextmanager
    def swapped(self, name: str, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Run with `tensors` (an EMA, say) as a role's weights, its own being kept; the role is entered inside."""
        own = self._weights[name]
        require_fit(name, own, tensors)
        device = next(iter(own.values())).device
        self._weights[name] = {
            key: nn.Parameter(tensors[key].detach().to(device), requires_grad=False) for key in own
        }
        try:
            yield
        finally:
            self._weights[name] = own

    def begin_stage_2(self, generator: Mapping[str, Tensor], fake: Mapping[str, Tensor]) -> None:
        """Start from stage 1's generator (its EMA) and its fake score; DataError where they don't fit."""
        for name, tensors in ((STAGE1_GENERATOR, generator), (GENERATOR, generator), (FAKE, fake)):
            self.load(name, tensors)

    def named_parameters(self, name: str) -> list[tuple[str, nn.Parameter]]:
        """A role's weights, named as in the transformer, in a fixed order."""
        return list(self._weights[name].items())

    def state(self, name: str) -> dict[str, Tensor]:
        """A copy of a role's weights, float32, on their device; names as in `named_parameters`."""
        return {key: parameter.detach().clone() for key, parameter in self._weights[name].items()}

    @torch.no_grad()
    def load(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Set a role's weights. DataError for a missing or unexpected name, another shape or dtype."""
        own = self._weights[name]
        require_fit(name, own, tensors)
        for key, parameter in own.items():
            parameter.copy_(tensors[key])


def _copy(transformer: nn.Module) -> Weights:
    """Float32 copies of every weight."""
    copies = {key: p.detach().to(torch.float32, copy=True) for key, p in transformer.named_parameters()}
    return {key: nn.Parameter(tensor, requires_grad=False) for key, tensor in copies.items()}


def _require(weights: Weights, flags: list[bool]) -> None:
    for parameter, flag in zip(weights.values(), flags, strict=True):
        parameter.requires_grad_(flag)


@torch.no_grad()
def replace_weights(transformer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a transformer the weights of a generator trained in full, in its own dtype; DataError if they don't fit."""
    own = dict(transformer.named_parameters())
    require_fit(GENERATOR, own, tensors)
    for key, parameter in own.items():
        parameter.copy_(tensors[key])

"""Teacher, fake score and generator as LoRA adapters on one shared, frozen base.

    stage 1   teacher = no adapter      fake = "fake"                    generator = "generator"
    stage 2   teacher = no adapter      fake = "stage1_fake" + "fake"    generator = "stage1_generator" + "generator"
              start   = "stage1_generator"
    EMA       a plain dict of tensors, put in the generator's place by `swapped`

In stage 2 the stage-1 adapters stay frozen underneath fresh ones: up to rounding what merging them would give,
while the base stays shared. A role's own adapter, the one that is trained, bears the role's name.

With two bases (`backbones.two_bases.TwoBases`) the adapters of generator and `start` live on the generator's own base,
and entering a role also switches to the role's base.

A trap of peft: switching adapters between a role's forward and its backward loses gradients in silence, and
peft's own `set_adapter` turns `requires_grad` on. So a role is entered with `Roles.role`, which restores all
that it touches, and **`backward` is called inside the context of the role that is trained**; other roles may
be entered and left in between.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rtdmd_cli.config.section import LoraConfig
from rtdmd_cli.engine.backbones.two_bases import Base, TwoBases
from rtdmd_cli.engine.compute import rng
from rtdmd_cli.engine.roles.base import (
    FAKE,
    GENERATOR,
    STAGE1_FAKE,
    STAGE1_GENERATOR,
    START,
    TEACHER,
    require_fit,
)
from rtdmd_cli.errors import UsageError

STAGE_1: dict[str, tuple[str, ...]] = {TEACHER: (), FAKE: (FAKE,), GENERATOR: (GENERATOR,)}
"""Role -> its adapters, bottom first."""
STAGE_2: dict[str, tuple[str, ...]] = {
    TEACHER: (),
    START: (STAGE1_GENERATOR,),
    FAKE: (STAGE1_FAKE, FAKE),
    GENERATOR: (STAGE1_GENERATOR, GENERATOR),
}
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
"""`lora.dtype` -> torch's."""
IN_ATTENTION = re.compile(r".*\.(attn|attention)\.(.+)")
"""Full name of a layer inside an attention module of diffusers' transformers; the second group is its ending."""


class Roles:
    """Adapters "generator" and "fake" on `transformer`; outside every context the base alone is active.

    LoRA weights have the format of `lora.dtype`, whatever the base's. `A ~ N(0, 1/r^2)` and `B = 0` (method, section 3), `A`
    drawn by (seed, adapter, layer): both roles start as the teacher. Freezes the base.
    transformer: a diffusers model without adapters. fresh: for stage 2, the LoRA of the new adapters; `lora` is
    then the shape of the frozen stage-1 adapters, to be loaded with `load`, and the new ones start with `B = 0` and
    `A ~ N(0, 1)` (section 4). UsageError where a target names no layer.
    """

    def __init__(
        self, transformer: Any, lora: LoraConfig, seed: int, fresh: LoraConfig | None = None
    ) -> None:
        self.transformer: nn.Module = transformer.requires_grad_(False)
        self._pair = transformer if isinstance(transformer, TwoBases) else None
        self._stacks = STAGE_1 if fresh is None else STAGE_2
        self.frozen: tuple[str, ...] = () if fresh is None else (STAGE1_GENERATOR, STAGE1_FAKE)
        if fresh is None:
            adapters = {GENERATOR: (lora, 1 / lora.rank), FAKE: (lora, 1 / lora.rank)}
        else:
            adapters = {STAGE1_GENERATOR: (lora, 1 / lora.rank), STAGE1_FAKE: (lora, 1 / lora.rank)}
            adapters |= {GENERATOR: (fresh, 1.0), FAKE: (fresh, 1.0)}
        bases = {
            name: transformer if self._pair is None else self._pair.base(_base_of(name)) for name in adapters
        }
        modules = {
            name: target_layers(bases[name], config, "distill" if config is lora else "tune_reward")
            for name, (config, _) in adapters.items()
        }
        for name, (config, _) in adapters.items():
            _add_adapter(bases[name], name, config, modules[name])
        self._layers: list[BaseTunerLayer] = []
        self._parameters: dict[str, dict[str, nn.Parameter]] = {name: {} for name in adapters}
        for base in dict.fromkeys(bases.values()):
            for name, module in base.named_modules():
                if isinstance(module, BaseTunerLayer):
                    self._layers.append(module)
                    self._collect(
                        name, module, {role: config.dtype for role, (config, _) in adapters.items()}
                    )
        self._all = [p for parameters in self._parameters.values() for p in parameters.values()]
        for name, (_, std) in adapters.items():
            self._initialise(name, std, seed)
        self._activate([])
        self._train(None)

    def _collect(self, name: str, layer: Any, formats: Mapping[str, str]) -> None:
        """Make the layer's LoRA weights in their adapter's format (peft would take the base's), and note them."""
        device = layer.get_base_layer().weight.device
        for adapter, parameters in self._parameters.items():
            if adapter in layer.lora_A:  # stage 2's adapters may have targets of their own
                for part, linears in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                    linear, dtype = linears[adapter], DTYPES[formats[adapter]]
                    empty = torch.empty(linear.weight.shape, dtype=dtype, device=device)
                    linear.weight = parameters[f"{name}.{part}.weight"] = nn.Parameter(empty)

    @torch.no_grad()
    def _initialise(self, adapter: str, std: float, seed: int) -> None:
        for name, parameter in self._parameters[adapter].items():
            if name.endswith("lora_A.weight"):
                noise = torch.randn(parameter.shape, generator=rng.generator(seed, f"lora/{adapter}/{name}"))
                parameter.copy_(noise * std)
            else:
                parameter.zero_()

    @contextmanager
    def role(self, name: str, train: bool = False) -> Iterator[None]:
        """Activate exactly this role; its LoRA weights require a gradient only if `train`.

        Contexts nest. On leaving, active adapters, the disabled flag and every `requires_grad` are as before.
        """
        assert name in self._stacks and not (train and name not in self._parameters), name
        switches = [(layer, layer.active_adapters, layer.disable_adapters) for layer in self._layers]
        requires_grad = [parameter.requires_grad for parameter in self._all]
        base = self._pair.active if self._pair else None
        try:
            self._activate(list(self._stacks[name]))
            self._train(name if train else None)
            if self._pair:
                self._pair.active = _base_of(name)
            yield
        finally:
            if self._pair and base:
                self._pair.active = base
            for layer, active, disabled in switches:
                _switch(layer, active, disabled)
            for parameter, flag in zip(self._all, requires_grad, strict=True):
                parameter.requires_grad_(flag)

    def _activate(self, active: list[str]) -> None:
        for layer in self._layers:
            _switch(layer, active, disabled=not active)

    def _train(self, trained: str | None) -> None:
        for role, parameters in self._parameters.items():
            for parameter in parameters.values():
                parameter.requires_grad_(role == trained)

    @contextmanager
    def swapped(self, name: str, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Run with `tensors` (an EMA, say) in place of an adapter's weights, which come back bit for bit.

        A graph built before or inside can't be differentiated afterwards: torch reports the changed weights.
        """
        own = self.state(name)
        self.load(name, tensors)
        try:
            yield
        finally:
            self.load(name, own)

    def begin_stage_2(self, generator: Mapping[str, Tensor], fake: Mapping[str, Tensor]) -> None:
        """Put stage 1's generator (its EMA) and fake score underneath; DataError where they don't fit."""
        self.load(STAGE1_GENERATOR, generator)
        self.load(STAGE1_FAKE, fake)

    def named_parameters(self, name: str) -> list[tuple[str, nn.Parameter]]:
        """An adapter's weights, named like `transformer_blocks.0.attn.to_q.lora_A.weight`, in a fixed order."""
        return list(self._parameters[name].items())

    def state(self, name: str) -> dict[str, Tensor]:
        """A copy of an adapter's weights, on their device; names as in `named_parameters`."""
        return {key: parameter.detach().clone() for key, parameter in self._parameters[name].items()}

    @torch.no_grad()
    def load(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Set an adapter's weights. DataError for a missing or unexpected name, another shape or dtype."""
        own = self._parameters[name]
        require_fit(name, own, tensors)
        for key, parameter in own.items():
            parameter.copy_(tensors[key])


def _base_of(name: str) -> Base:
    """Which of two bases a role computes on, and an adapter lives on."""
    return "generator" if name in (GENERATOR, START, STAGE1_GENERATOR) else "teacher"


def _add_adapter(transformer: Any, name: str, lora: LoraConfig, modules: list[str]) -> None:
    """Put an adapter on, whose weights have no memory yet."""
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=modules)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are what we want
        peft.inject_adapter_in_model(config, transformer, name)
    transformer._hf_peft_config_loaded = (
        True  # as diffusers' own `add_adapter`, which would make them at once
    )


def target_layers(transformer: nn.Module, lora: LoraConfig, section: str) -> list[str]:
    """Full names of the linear layers in a module `attn` or `attention` that `lora.targets` name by their endings.

    Full names, because FLUX.2 has linear layers and lists of layers of the same ending. UsageError for a target that
    names none.
    """
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    found = {name: match[2] for name in linear if (match := IN_ATTENTION.fullmatch(name))}
    missing = [target for target in lora.targets if target not in found.values()]
    if missing:
        there = sorted(set(found.values()))
        raise UsageError(
            f"{section}.lora.targets: no attention layer of the model is called {', '.join(missing)}.",
            f"It has {', '.join(there)}.",
        )
    return [name for name, ending in found.items() if ending in lora.targets]


def _switch(layer: BaseTunerLayer, active: list[str], disabled: bool) -> None:
    """Switch adapters like peft's `set_adapter` and `enable_adapters`, without their pass over every `requires_grad`.

    That pass makes them 18 times slower, and its result is overwritten here anyway.
    """
    layer._active_adapter = active
    layer._disable_adapters = disabled

"""Teacher, fake score and generator as LoRA adapters on one shared, frozen base.

    teacher = no adapter      fake = adapter "fake"      generator = adapter "generator"
    EMA     = a plain dict of tensors, put in the generator's place by `swapped`

A trap of peft: switching adapters between a role's forward and its backward loses gradients in silence, and
peft's own `set_adapter` turns `requires_grad` on. So a role is entered with `Roles.role`, which restores all
that it touches, and **`backward` is called inside the context of the role that is trained**; other roles may
be entered and left in between.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rtdmd_cli.config.schema import LoraConfig
from rtdmd_cli.engine.runtime import rng
from rtdmd_cli.errors import DataError, UsageError

TEACHER, FAKE, GENERATOR = "teacher", "fake", "generator"
ADAPTERS = (GENERATOR, FAKE)


class Roles:
    """Adapters "generator" and "fake" on `transformer`; outside every context the base alone is active.

    LoRA weights are float32 whatever the base's dtype. `A ~ N(0, 1/r^2)` and `B = 0` (method, section 3), `A`
    drawn by (seed, role, layer): both roles start as the teacher. Freezes the base.
    transformer: a diffusers model without adapters. UsageError where a target of `lora` names no layer.
    """

    def __init__(self, transformer: Any, lora: LoraConfig, seed: int) -> None:
        _check_targets(transformer, lora)
        self.transformer: nn.Module = transformer.requires_grad_(False)
        for role in ADAPTERS:
            config = peft.LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                target_modules=[f"attn.{target}" for target in lora.targets],
                init_lora_weights="gaussian",
            )
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two are what we want
                transformer.add_adapter(config, role)  # its draws are replaced below by keyed ones
        self._layers: list[BaseTunerLayer] = []
        self._parameters: dict[str, dict[str, nn.Parameter]] = {role: {} for role in ADAPTERS}
        for name, module in transformer.named_modules():
            if isinstance(module, BaseTunerLayer):
                self._layers.append(module)
                self._collect(name, module)
        self._all = [p for parameters in self._parameters.values() for p in parameters.values()]
        self._initialise(lora.rank, seed)
        self._activate([])
        self._train(None)

    def _collect(self, name: str, layer: Any) -> None:
        """Cast the layer's LoRA weights to float32 (peft makes them in the base's dtype) and note them."""
        for role, parameters in self._parameters.items():
            parameters[f"{name}.lora_A.weight"] = layer.lora_A[role].float().weight
            parameters[f"{name}.lora_B.weight"] = layer.lora_B[role].float().weight

    @torch.no_grad()
    def _initialise(self, rank: int, seed: int) -> None:
        for role, parameters in self._parameters.items():
            for name, parameter in parameters.items():
                if name.endswith("lora_A.weight"):
                    noise = torch.randn(parameter.shape, generator=rng.generator(seed, f"lora/{role}/{name}"))
                    parameter.copy_(noise / rank)
                else:
                    parameter.zero_()

    @contextmanager
    def role(self, name: str, train: bool = False) -> Iterator[None]:
        """Activate exactly this role; its LoRA weights require a gradient only if `train`.

        Contexts nest. On leaving, active adapters, the disabled flag and every `requires_grad` are as before.
        """
        assert name in (TEACHER, *ADAPTERS) and not (train and name == TEACHER), name
        switches = [(layer, layer.active_adapters, layer.disable_adapters) for layer in self._layers]
        requires_grad = [parameter.requires_grad for parameter in self._all]
        try:
            self._activate([] if name == TEACHER else [name])
            self._train(name if train else None)
            yield
        finally:
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
        """Run with `tensors` (an EMA, say) in place of the role's weights, which come back bit for bit.

        A graph built before or inside can't be differentiated afterwards: torch reports the changed weights.
        """
        own = self.state(name)
        self.load(name, tensors)
        try:
            yield
        finally:
            self.load(name, own)

    def named_parameters(self, name: str) -> list[tuple[str, nn.Parameter]]:
        """The role's weights, named like `transformer_blocks.0.attn.to_q.lora_A.weight`, in a fixed order."""
        return list(self._parameters[name].items())

    def state(self, name: str) -> dict[str, Tensor]:
        """A copy of the role's weights, float32, on their device; names as in `named_parameters`."""
        return {key: parameter.detach().clone() for key, parameter in self._parameters[name].items()}

    @torch.no_grad()
    def load(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Set the role's weights. DataError for a missing or unexpected name, another shape or dtype."""
        own = self._parameters[name]
        problems = [f"{key} is missing" for key in own if key not in tensors]
        problems += [f"{key} is unexpected" for key in tensors if key not in own]
        for key in (key for key in own if key in tensors):
            if tensors[key].shape != own[key].shape or tensors[key].dtype != torch.float32:
                found = f"{tensors[key].dtype} {list(tensors[key].shape)}"
                problems.append(f"{key} is {found} instead of torch.float32 {list(own[key].shape)}")
        if problems:
            shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if problems[5:] else "")
            raise DataError(
                f"These weights don't fit the adapter {name}: {shown}.",
                "Use weights made with the same model and the same distill.lora settings.",
            )
        for key, parameter in own.items():
            parameter.copy_(tensors[key])


def _check_targets(transformer: nn.Module, lora: LoraConfig) -> None:
    """UsageError unless each of `lora.targets` ends the name of a linear layer in a module `attn`."""
    linear = [f".{name}" for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    missing = [t for t in lora.targets if not any(name.endswith(f".attn.{t}") for name in linear)]
    if missing:
        there = sorted({name.rpartition(".attn.")[2] for name in linear if ".attn." in name})
        raise UsageError(
            f"distill.lora.targets: no attention layer of the model is called {', '.join(missing)}.",
            f"It has {', '.join(there)}.",
        )


def _switch(layer: BaseTunerLayer, active: list[str], disabled: bool) -> None:
    """What peft's `set_adapter` and `enable_adapters` do, less their pass over every `requires_grad`.

    That pass makes them 18 times slower, and its result is overwritten here anyway.
    """
    layer._active_adapter = active
    layer._disable_adapters = disabled

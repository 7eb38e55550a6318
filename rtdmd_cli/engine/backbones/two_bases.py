"""Two base models in the place of one: the generator starts from weights of its own.

FLUX.2-klein's published recipe: teacher and fake score on klein-base, the generator on the few-step klein. Both are
frozen; the generator's adapters live on its own base, everything else on the teacher's.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

Base = Literal["teacher", "generator"]


class TwoBases(nn.Module):
    """Two transformers of the same family behind one call; `active` chooses which one computes.

    `roles.adapters.Roles.role` sets it: "generator" for the generator of either stage, else "teacher".
    """

    def __init__(self, teacher: nn.Module, generator: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher
        self.generator = generator
        self.active: Base = "teacher"

    def base(self, name: Base) -> nn.Module:
        """The transformer called `name`."""
        return self.teacher if name == "teacher" else self.generator

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.base(self.active)(*arguments, **named)

    def enable_gradient_checkpointing(self) -> None:
        """As on a transformer of diffusers, on both."""
        for transformer in (self.teacher, self.generator):
            transformer.enable_gradient_checkpointing()  # type: ignore[operator]


def bases_of(transformer: nn.Module) -> list[nn.Module]:
    """The transformers of diffusers behind a backbone's `transformer`: one, or two."""
    if isinstance(transformer, TwoBases):
        return [transformer.teacher, transformer.generator]
    return [transformer]

"""A step as the published code makes it: three copies of the network, one boundary a rollout, consistency in two passes.

Written against the formulas of `rtdmd_cli.engine.algo` alone; on small models its cost is compared with ours, not its result.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from rtdmd_cli.engine.algo.flow import cps_step, to_x0
from rtdmd_cli.engine.algo.losses import consistency_loss, dmd_loss, fake_score_loss
from rtdmd_cli.engine.algo.subinterval import renoise, velocity_target
from rtdmd_cli.engine.training.trainer import Trainer


class Baseline:
    """Generator, fake score and teacher, each a whole network of its own; built from a trainer's."""

    def __init__(self, trainer: Trainer) -> None:
        config = trainer.config
        self._trainer = trainer
        source: Any = trainer.backbone.transformer
        plain = type(source).from_config(source.config).to(trainer.backbone.device)
        self.networks: dict[str, Any] = {}
        for name in ("generator", "fake"):
            self.networks[name] = deepcopy(plain).requires_grad_(False)
            targets = list(config.lora.targets)
            self.networks[name].add_adapter(
                LoraConfig(r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=targets)
            )
        self.networks["teacher"] = plain.requires_grad_(False)
        self._optimizers = {
            name: torch.optim.AdamW([p for p in self.networks[name].parameters() if p.requires_grad], lr=1e-5)
            for name in ("generator", "fake")
        }

    def step(self, number: int) -> None:
        """The fake's turn, then the generator's."""
        torch.manual_seed(number)
        self._turn("fake", self._fake_loss)
        self._turn("generator", self._generator_loss)

    def _turn(self, role: str, loss: Callable[[], Tensor]) -> None:
        optimizer = self._optimizers[role]
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        assert bool(value.isfinite())
        value.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.networks[role].parameters() if p.requires_grad], 1.0)
        optimizer.step()

    def _velocity(self, role: str, x: Tensor, sigma: Tensor | float, empty: bool = False) -> Tensor:
        trainer = self._trainer
        given = list(range(trainer.config.batch))
        cond = trainer.conditioning([index % trainer.prompts for index in given])
        if empty:
            cond = trainer.empty.select([0] * len(x))
        level = sigma if isinstance(sigma, Tensor) else x.new_full(x.shape[:1], sigma)
        found: Tensor = self.networks[role](
            hidden_states=x,
            timestep=1000 * level,
            encoder_hidden_states=cond.embeds,
            pooled_projections=cond.pooled,
            return_dict=False,
        )[0]
        return found

    def _rollout(self, gradient: bool) -> tuple[Tensor, float]:
        """x_s after 1 to T steps, 2.5 evaluations on average; the gradient flows through the last."""
        trainer = self._trainer
        stop = int(torch.randint(1, len(trainer.sigmas), ()))
        x = self._noise()
        for number in range(stop):
            sigma, s = trainer.sigmas[number], trainer.sigmas[number + 1]
            with torch.set_grad_enabled(gradient and number + 1 == stop):
                v = self._velocity("generator", x, sigma)
                x = cps_step(x, v, sigma, s, trainer.eta, self._noise()) if s > 0 else to_x0(x, sigma, v)
        return x, s

    def _noise(self) -> Tensor:
        shape, device = self._trainer.shape, self._trainer.backbone.device
        return torch.randn(self._trainer.config.batch, *shape, device=device)

    def _noised(self, x_s: Tensor, s: float) -> tuple[Tensor, Tensor, Tensor]:
        t = (s + 0.01 + torch.rand(len(x_s), device=x_s.device) * (0.99 - s)).clamp(0.02, 0.98)
        noise = self._noise()
        return renoise(x_s, s, t, noise), t, noise

    def _fake_loss(self) -> Tensor:
        x_s, s = self._rollout(False)
        x_t, t, noise = self._noised(x_s, s)
        u, scale = velocity_target(x_s, s, t, noise)
        v = self._velocity("fake", x_t, t)
        later = (t - torch.randint(1, 201, t.shape, device=t.device) / 1000).clamp_min(0)
        starts = [cps_step(x_t, v.detach(), t, later, self._trainer.eta, self._noise()) for _ in range(2)]
        h_1, h_2 = (to_x0(x, later, self._velocity("fake", x, later)) for x in starts)
        return fake_score_loss(v, u, scale).loss + 0.01 * consistency_loss(to_x0(x_t, t, v), h_1, h_2).loss

    def _generator_loss(self) -> Tensor:
        x_s, s = self._rollout(True)
        x_t, t, _ = self._noised(x_s.detach(), s)
        noise = self._noise()
        with torch.no_grad():
            fake = self._velocity("fake", x_t, t)
            with_prompt = self._velocity("teacher", x_t, t)
            without = self._velocity("teacher", x_t, t, empty=True)
            teacher = without + self._trainer.guidance[0] * (with_prompt - without)
            y_fake, y_teacher = (cps_step(x_t, v, t, s, self._trainer.eta, noise) for v in (fake, teacher))
        return dmd_loss(x_s, y_fake, y_teacher).loss

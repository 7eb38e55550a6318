"""A stage on shapes alone, phase by phase: what the card holds at each phase's peak, and what is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rtdmd_cli.config.schema import SHARED_BASE, Preset
from rtdmd_cli.engine.backbones.base import Conditioning
from rtdmd_cli.engine.backbones.two_bases import bases_of
from rtdmd_cli.engine.compute.device import float32_matmul
from rtdmd_cli.engine.compute.float32_products import multiply_in_float32
from rtdmd_cli.engine.distill.run import trainer_on
from rtdmd_cli.engine.planning.account import Account, fused_attention
from rtdmd_cli.engine.planning.rewards import RewardsOnShapes
from rtdmd_cli.engine.planning.skeleton import META, Configs, Skeleton, skeleton, tensors_of
from rtdmd_cli.engine.planning.stand_ins import autocast_on_shapes, multiplies_wide, optimizer_bytes, quantise
from rtdmd_cli.engine.roles.base import FAKE, GENERATOR
from rtdmd_cli.engine.sampling.sample import guided
from rtdmd_cli.engine.training.assembly import training_sigmas
from rtdmd_cli.engine.training.matching import add_fake_gradients, add_matching_gradients
from rtdmd_cli.engine.training.previews import COUNT
from rtdmd_cli.engine.training.trainer import Trainer
from rtdmd_cli.engine.tune_reward.fake_score import add_recorded_fake_gradients
from rtdmd_cli.engine.tune_reward.pull import latent_gradient
from rtdmd_cli.engine.tune_reward.recipe import accumulate_generator
from rtdmd_cli.engine.tune_reward.rollouts import Pull, Rollouts, Tuner
from rtdmd_cli.engine.tune_reward.run import tuner_on

ROLL, GRID, DECODE, DECODE_GRADIENT = "rollout", "sample grid", "decode", "gradient of decode"
FAKE_TURN, GENERATOR_TURN, MATCHING = "fake turn", "generator turn", "generator matching"
KINDS = ("weights", "adapters", "gradients", "optimiser", "activations")


@dataclass(frozen=True)
class Phase:
    """What the card holds at a phase's peak, in bytes by kind (the average is among the adapters), and what is computed.

    flops: of one micro-batch, one evaluation, one batch of pictures or of prompts: `work` says how often.
    """

    name: str
    kinds: Mapping[str, int]
    flops: int

    @property
    def peak(self) -> int:
        return sum(self.kinds.values())


@dataclass
class Run:
    """A stage that is being counted: what lies on the card in every phase, and the phases so far.

    loaded: bytes of each network as loaded, before anything is quantised. trained: how many numbers are trained, in both
    roles. held: keeps alive what stands for something else.
    """

    account: Account
    made: Skeleton
    preset: Preset
    loaded: dict[str, int]
    kinds: dict[str, int] = field(default_factory=dict)
    phases: list[Phase] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)
    trained: int = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block."""
        self.account.restart()
        yield
        kinds = dict(self.kinds)
        kinds["activations"] = self.account.peak - sum(kinds.values())
        self.phases.append(Phase(name, kinds, self.account.flops))

    def quantities(self) -> dict[str, int]:
        """Every number, by name: sums over the blocks of the network, plus constants."""
        found = {f"{phase.name}/{kind}": size for phase in self.phases for kind, size in phase.kinds.items()}
        found |= {f"{phase.name}/flops": phase.flops for phase in self.phases}
        found |= {f"loaded/{name}": size for name, size in self.loaded.items()}
        side = self.preset.model.resolution
        latent = math.prod(self.made.backbone.latent_shape(side, side))
        return found | {"trained": self.trained, "latent": latent}


@contextmanager
def counted(preset: Preset, dtype: torch.dtype, configs: Configs) -> Iterator[Run]:
    """A model on shapes, and the account of what runs in the block."""
    hardware, own = preset.hardware, preset.model.generator_init != SHARED_BASE
    made = skeleton(preset.model, hardware, dtype, configs, own)
    bases = dict(zip(("transformer", "generator"), bases_of(made.backbone.transformer), strict=False))
    networks = {**bases, "vae": made.vae}
    loaded = {name: sum(t.nbytes for t in tensors_of([each])) for name, each in networks.items()}
    wide = multiplies_wide(hardware, dtype)
    for base in bases.values():
        quantise(base, hardware.base, wide=wide)
        if wide:
            multiply_in_float32(base)
    if hardware.device == "cpu":  # as `loading.Opener.vae`
        made.vae.float()
    fused = nullcontext() if hardware.float32_matmul == "medium" else fused_attention()
    run = Run(Account(), made, preset, loaded)
    mixed = dtype if preset.distill.train == "full" and dtype != torch.float32 else None
    with float32_matmul(hardware.float32_matmul, META), fused, autocast_on_shapes(mixed), run.account:
        run.kinds["weights"] = run.account.hold(tensors_of(networks.values()))
        yield run


def on_shapes(preset: Preset) -> Preset:
    """Without what shapes don't have: 8-bit optimisers, whose states are counted by themselves, and compiled blocks."""
    changed = {"optimizer": "adamw", "compile": False, "mixed_precision": "none"}
    return preset.model_copy(update={"hardware": preset.hardware.model_copy(update=changed)})


def prepare(run: Run, trainer: Trainer) -> None:
    """As in the middle of a training: optimiser states and gradients are there."""
    trainer.read = lambda values: [1.0] * len(values)
    trainer.boundary = lambda trainer, turn, iteration: min(
        trainer.config.backprop_steps, len(trainer.sigmas) - 1
    )
    run.kinds["adapters"] = run.account.live - sum(run.kinds.values())
    named = [trainer.roles.named_parameters(role) for role in (FAKE, GENERATOR)]
    parameters = [parameter for role in named for _, parameter in role]
    run.trained = sum(parameter.numel() for parameter in parameters)
    run.kinds["optimiser"] = optimizer_bytes(parameters, run.preset.hardware.optimizer)
    run.held.append(torch.empty(run.kinds["optimiser"], dtype=torch.uint8, device=META))
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    run.kinds["gradients"] = sum(parameter.nbytes for parameter in parameters)


@contextmanager
def turn(run: Run, trainer: Trainer, name: str, role: str, parts: int) -> Iterator[None]:
    """A micro-batch of a role's turn; of several `parts` it is a later one, which finds gradients there."""
    if parts == 1:
        for _, parameter in trainer.roles.named_parameters(role):
            parameter.grad = None
    trainer.begin()
    with run.phase(name):
        yield


def pictures(run: Run, trainer: Trainer, cond: Conditioning) -> None:
    """An evaluation of the generator without gradient, one of the teacher for a sample grid, and the grid's decoding."""
    x = torch.empty(len(cond), *trainer.shape, device=META)
    with torch.no_grad(), trainer.roles.role("generator"), run.phase(ROLL):
        trainer.backbone.velocity(x, x.new_full(x.shape[:1], 0.5), cond)
    grid, x = cond.select([0] * COUNT), torch.empty(COUNT, *trainer.shape, device=META)
    velocity = guided(trainer.backbone, grid, trainer.empty, run.preset.model.guidance)
    with torch.no_grad(), trainer.roles.role("teacher"), run.phase(GRID):
        velocity(x, x.new_full((COUNT,), 0.5))
    with torch.no_grad(), run.phase(DECODE):
        trainer.backbone.decode(x)


def distill_run(preset: Preset, dtype: torch.dtype, configs: Configs) -> Run:
    """The phases of stage 1. A turn's rollouts stop at the first boundary, where one is drawn."""
    config = preset.distill
    size = config.micro_batch or config.batch
    with counted(preset, dtype, configs) as run:
        made, prompts = run.made, [0] * size
        sigmas, one = training_sigmas(made.backbone, preset), made.prompts(1)
        trainer = trainer_on(sigmas, made.backbone, on_shapes(preset), 1, one.select, one)
        prepare(run, trainer)
        pictures(run, trainer, one.select(prompts))
        with turn(run, trainer, FAKE_TURN, FAKE, config.batch // size):
            add_fake_gradients(trainer, "fake", 0, prompts)
        with turn(run, trainer, GENERATOR_TURN, GENERATOR, config.batch // size):
            add_matching_gradients(trainer, "generator", 0, prompts)
    return run


def tune_run(preset: Preset, dtype: torch.dtype, configs: Configs) -> Run:
    """The phases of stage 2, without the reward models."""
    config = preset.tune_reward
    size = config.micro_batch or config.images_per_epoch
    with counted(preset, dtype, configs) as run:
        made, rewards = run.made, RewardsOnShapes(config.rewards)
        sigmas, one = training_sigmas(made.backbone, preset), made.prompts(1)
        tuner = tuner_on(sigmas, made.backbone, on_shapes(preset), rewards, 1, one.select, one)
        prepare(run, tuner.core)
        pictures(run, tuner.core, one.select([0] * size))
        count_turns(run, tuner, size)
    return run


def count_turns(run: Run, tuner: Tuner, size: int) -> None:
    """Both turns of stage 2, each on a micro-batch of `size` pictures."""
    core, config, part = tuner.core, tuner.config, range(size)
    parts, prompts = config.images_per_epoch // size, [0] * size
    x = torch.empty(size, len(core.sigmas), *core.shape, device=META)
    logp = torch.empty(size, tuner.stochastic, device=META)
    steps = tuple(range(min(config.subset_steps, tuner.stochastic)))
    rollouts = Rollouts(x, logp, torch.tensor(prompts), steps, (part,), 0, size)
    if config.dmd_weight:
        with turn(run, core, FAKE_TURN, FAKE, parts):
            if config.tilt or config.matching == "last":
                add_recorded_fake_gradients(tuner, 0, rollouts, [(part, part)], 1.0)
            else:
                add_fake_gradients(core, "fake", 0, prompts)
    if config.dmd_weight and config.matching == "distill":  # on a number of images of its own
        with turn(run, core, MATCHING, GENERATOR, parts):
            add_matching_gradients(core, "generator", 0, prompts)
        tuner = replace(tuner, config=config.model_copy(update={"dmd_weight": 0.0}))
    if tuner.backprop_weight:
        side = run.preset.model.resolution
        with run.phase(DECODE_GRADIENT):
            latent_gradient(core.backbone, x[:, -1], torch.empty(size, 3, side, side, device=META))
        rollouts = replace(rollouts, pull=Pull(torch.empty(size, device=META), torch.empty_like(x[:, -1])))
    with turn(run, core, GENERATOR_TURN, GENERATOR, parts):
        accumulate_generator(tuner, 0, rollouts, torch.empty(size, device=META))


RUNS: dict[str, Callable[[Preset, torch.dtype, Configs], Run]] = {
    "distill": distill_run,
    "tune-reward": tune_run,
}


def phases_of(found: Mapping[str, int], names: Sequence[str]) -> list[Phase]:
    """Phases from `Run.quantities`."""
    return [
        Phase(name, {kind: found[f"{name}/{kind}"] for kind in KINDS}, found[f"{name}/flops"])
        for name in names
    ]

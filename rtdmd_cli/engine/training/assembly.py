"""How a training is put together, for both stages: encoded prompts, the schedule, optimisers, the trainer."""

from collections.abc import Callable, Sequence

import torch

from rtdmd_cli.config.schema import DistillConfig, HardwareConfig, Preset
from rtdmd_cli.engine.backbones.base import Backbone, Conditioning
from rtdmd_cli.engine.compute import optim
from rtdmd_cli.engine.compute.blocks import compile_blocks
from rtdmd_cli.engine.compute.device import useful_matmul
from rtdmd_cli.engine.compute.mixed import MixedPrecision, resolve_mixed_precision
from rtdmd_cli.engine.prompts.ahead import AheadEncoder, told
from rtdmd_cli.engine.prompts.embeddings import open_cache
from rtdmd_cli.engine.roles.base import FAKE, GENERATOR, RoleSet
from rtdmd_cli.engine.sampling.sample import few_step_levels
from rtdmd_cli.engine.training.trainer import Trainer
from rtdmd_cli.errors import UsageError

HARDWARE = HardwareConfig()
PRELOAD_BYTES = 2_000_000_000
"""Encoded prompts up to this size are held in memory; more are read from the cache batch by batch."""


def model_line(preset: Preset, backbone: Backbone) -> str:
    """Which model was loaded where and how, for people."""
    base = preset.hardware.base
    stored = "" if base == "plain" else f", blocks in {base}"
    mixed = resolve_mixed_precision(preset.hardware, backbone.device, backbone.dtype)
    products = f", trained with products in {mixed}" if mixed else ""
    line = f"model {preset.model.path} on {backbone.device}, {backbone.dtype}{stored}{products}"
    return f"{line}{backbone.remark(preset.model.guidance)}".replace("torch.", "")


def encode_prompts(
    backbone: Backbone,
    prompts: Sequence[str],
    say: Callable[[str], None],
    hardware: HardwareConfig = HARDWARE,
    check: Callable[[], None] = lambda: None,
    training: int | None = None,
) -> tuple[Callable[[Sequence[int]], Conditioning], Conditioning]:
    """A look-up of encoded prompts by index, and the empty prompt. check: called before every few of them.

    Each prompt is encoded once and the text encoders are freed. Where the cache's bound does not take them all, the
    look-up is an `AheadEncoder`, and the encoders stay until the prompts of all coming iterations are there. training:
    how many of the prompts, from the first on, are trained on, by default all: only these are counted to people.
    """
    count = len(prompts) if training is None else training
    if hardware.text_encoder == "cpu":
        backbone.encoder_device = torch.device("cpu")

    def encode(texts: Sequence[str]) -> Conditioning:
        check()
        return backbone.encode(texts)

    cache = open_cache(backbone, hardware.cache_gb)
    fresh = cache.ensure([""], backbone.encode)
    empty = cache.fetch([""])
    row, distinct = empty.row_bytes(backbone.text_length), len({*prompts, ""})
    capacity = cache.capacity(row)
    if distinct > capacity:
        if hardware.text_encoder == "auto":
            backbone.encoder_device = torch.device("cpu")
        say(
            f"{count} prompts, of which the cache takes {capacity} at a time: "
            f"encoded ahead on {backbone.encoder_device}"
        )
        free = backbone.drop_text_encoders
        return AheadEncoder(cache, prompts, backbone.encode, capacity, say, free), empty
    fresh += cache.ensure(prompts, told(encode, say))
    say(f"{count} prompts, {fresh} newly encoded" if fresh else f"{count} prompts, all in the cache")
    backbone.drop_text_encoders()
    if (len(prompts) + 1) * row > PRELOAD_BYTES:
        return lambda indices: cache.fetch([prompts[i] for i in indices]), empty
    everything = cache.fetch(list(prompts))
    return everything.select, empty


def prepare_prompts(
    trainer: Trainer,
    iteration: int,
    total: int,
    order: Callable[[int], Sequence[int]],
    stopping: Callable[[], bool],
) -> bool:
    """Encode ahead for an iteration, where that is needed; whether its prompts are there.

    order: prompt indices of an iteration. stopping: asked before every few prompts; whether to leave it there.
    """
    if not isinstance(trainer.conditioning, AheadEncoder):
        return True
    with trainer.processes.first_here():
        return trainer.conditioning.prepare(iteration, total, order, stopping)


def training_sigmas(backbone: Backbone, preset: Preset) -> tuple[float, ...]:
    """The few-step schedule at the preset's resolution.

    UsageError for a size that the model can't do, or a first boundary above the levels of matching.
    """
    shape = backbone.latent_shape(preset.model.resolution, preset.model.resolution)
    sigmas = tuple(backbone.sigmas(few_step_levels(preset.sampler), shape).tolist())
    if sigmas[1] >= preset.distill.t_max:
        raise UsageError(
            f"The first boundary of the schedule lies at sigma {sigmas[1]:.3f}, not below `distill.t_max`.",
            "Choose other `sampler.raw_steps`, or a larger `distill.t_max`.",
        )
    return sigmas


def assemble(
    backbone: Backbone,
    preset: Preset,
    config: DistillConfig,
    roles: RoleSet,
    sigmas: tuple[float, ...],
    weight_decays: dict[str, float],
    prompts: int,
    conditioning: Callable[[Sequence[int]], Conditioning],
    empty: Conditioning,
) -> Trainer:
    """A trainer of either stage. config: section 3's settings; weight_decays: by role."""
    if preset.hardware.gradient_checkpointing:
        backbone.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
    if preset.hardware.compile:
        compile_blocks(backbone.transformer, backbone.device)
    fake, generator = (
        optim.build_optimizer(
            roles.named_parameters(role),
            lr,
            config.betas,
            config.eps,
            weight_decays[role],
            preset.hardware.optimizer,
        )
        for role, lr in ((FAKE, config.fake_lr), (GENERATOR, config.generator_lr))
    )
    matmul = preset.hardware.float32_matmul
    mixed = resolve_mixed_precision(preset.hardware, backbone.device, backbone.dtype)
    # Elsewhere nothing is to be gathered, and with "highest" and "high" a CPU's results are to the last digit what they were.
    rounded = mixed is not None or (matmul == "medium" and backbone.device.type == "cpu")
    return Trainer(
        backbone=backbone,
        roles=roles,
        config=config,
        sigmas=sigmas,
        eta=preset.sampler.eta,
        guidance=preset.matching_guidance,
        shape=backbone.latent_shape(preset.model.resolution, preset.model.resolution),
        prompts=prompts,
        conditioning=conditioning,
        empty=empty.to(backbone.device, backbone.dtype),
        fake_optimizer=fake,
        generator_optimizer=generator,
        ema=optim.ema_start(roles.named_parameters(GENERATOR)),
        matmul=matmul if mixed else useful_matmul(matmul, backbone.device),
        mixed=MixedPrecision((backbone.transformer, backbone.decoder), mixed)
        if rounded
        else MixedPrecision(),
    )

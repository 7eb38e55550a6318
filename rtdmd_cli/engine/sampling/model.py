"""A model that is loaded and ready to sample: a run's generator, an exported one, or a base model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rtdmd_cli.config.schema import SHARED_BASE, Preset
from rtdmd_cli.engine.backbones.base import Backbone
from rtdmd_cli.engine.backbones.families import load_backbone
from rtdmd_cli.engine.backbones.two_bases import TwoBases, bases_of
from rtdmd_cli.engine.rewards import needed
from rtdmd_cli.engine.roles.adapters import Roles
from rtdmd_cli.engine.roles.base import GENERATOR, STAGE1_GENERATOR
from rtdmd_cli.engine.roles.full import replace_weights
from rtdmd_cli.engine.sampling.sample import SamplingPlan, sampling_plan
from rtdmd_cli.engine.sampling.source import Source
from rtdmd_cli.engine.storage.checkpoint import Checkpoint, load_checkpoint
from rtdmd_cli.engine.storage.exported import Exported
from rtdmd_cli.engine.storage.lora_files import add_lora, read_lora
from rtdmd_cli.errors import DataError

EMA = "ema"  # the checkpoint's group that a generator's pictures are made with


@dataclass(frozen=True)
class Model:
    """A loaded model, ready to sample. roles: None for a teacher, an exported folder, and a generator trained in full,
    which has taken the base's place. model_hash: 12 hexadecimal digits."""

    source: Source
    backbone: Backbone
    roles: Roles | None
    model_hash: str

    @property
    def label(self) -> str:
        return self.source.label

    def plan(
        self,
        steps: int | None = None,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
    ) -> SamplingPlan:
        """How this model makes a picture of `size` (height, width). UsageError as `sampling_plan`."""
        model, sampler = self.source.preset.model, self.source.preset.sampler
        exported = self.source.exported
        if exported is not None and exported.stock_schedule:
            shape = self.backbone.latent_shape(*(size or (model.resolution, model.resolution)))
            levels = self.backbone.stock_sigmas(steps or len(sampler.raw_steps), shape)
            return SamplingPlan("generator", tuple(levels.tolist()), eta=sampler.eta)
        return sampling_plan(self.source.kind, self.backbone, model, sampler, steps, guidance, size)


def open_model(
    source: Source,
    device: torch.device,
    dtype: torch.dtype,
    prepare: Callable[[Backbone], None] = lambda backbone: None,
) -> Model:
    """Load the base model and, for a generator, put the EMA weights of the checkpoint on it.

    prepare: is given the backbone of a generator before its transformer is loaded, so that text encoders can come and go.
    DataError for a checkpoint that is damaged or doesn't fit the model; other errors as `load_backbone`.
    """
    if source.exported is not None:
        return _open_exported(source, source.exported, device, dtype, prepare)
    loaded = load_checkpoint(source.checkpoint) if source.checkpoint is not None else None
    if loaded is not None and EMA not in loaded.tensors:
        raise DataError(
            f"The checkpoint {loaded.path} holds no generator: {EMA}.safetensors is missing.",
            "Choose a checkpoint of `rtdmd distill` or `rtdmd tune-reward`.",
        )
    config = source.preset.model
    if loaded is None:  # the generator's own base is of no use to the teacher
        config = config.model_copy(update={"generator_init": SHARED_BASE})
    needed.require(needed.models(config))
    backbone = load_backbone(config, device, dtype, source.preset.hardware)
    base = backbone.model_id.hash
    if loaded is None:
        return Model(source, backbone, None, model_hash(weights_id(backbone, source.preset), {}, 0))
    if loaded.meta.get("base_hash", base) != base:
        raise DataError(
            f"The checkpoint {loaded.path} was trained on another version of {source.preset.model.path}.",
            "Sample it with the very base model it was trained on.",
        )
    prepare(backbone)
    roles, hashed = open_generator(backbone, source.preset, loaded)
    return Model(source, backbone, roles, hashed)


def _open_exported(
    source: Source,
    exported: Exported,
    device: torch.device,
    dtype: torch.dtype,
    prepare: Callable[[Backbone], None],
) -> Model:
    """A merged pipeline as it is, or the base model with the exported LoRA on the generator's base."""
    model = exported.preset.model
    if exported.merged or exported.lora is None:
        own = {"path": str(exported.folder), "revision": None, "components": None}
        model = model.model_copy(update=own | {"generator_init": SHARED_BASE, "guidance": 1.0})
        backbone = load_backbone(model, device, dtype, source.preset.hardware)
        return Model(source, backbone, None, model_hash(backbone.model_id.hash, {}, 0))
    backbone = load_backbone(model, device, dtype, source.preset.hardware)
    if backbone.model_id.hash != exported.base_hash:
        raise DataError(
            f"{exported.folder} belongs to another version of {model.path}.",
            "Use the base model that its README.md names.",
        )
    prepare(backbone)
    base = backbone.transformer
    if isinstance(base, TwoBases):
        base.active = "generator"
        base = base.generator
    tensors = read_lora(exported.lora, exported.prefix, base)
    add_lora(base, tensors, exported.prefix)
    return Model(source, backbone, None, model_hash(backbone.model_id.hash, tensors, 0))


def open_generator(backbone: Backbone, preset: Preset, checkpoint: Checkpoint) -> tuple[Roles | None, str]:
    """The generator of a checkpoint of either stage, with its EMA weights, and the model's hash.

    None where it was trained in full: the transformer then has its weights. DataError where the weights don't fit.
    """
    if preset.distill.train == "full":
        ema = checkpoint.tensors[EMA]
        try:
            replace_weights(bases_of(backbone.transformer)[0], ema)
        except DataError as error:
            raise _foreign(checkpoint, EMA, error) from error
        return None, model_hash(weights_id(backbone, preset), ema, 0)
    base, ema, lora = weights_id(backbone, preset), checkpoint.tensors[EMA], preset.distill.lora
    tuned = checkpoint.state.get("stage") == "tune-reward"
    fresh = preset.tune_reward.lora if tuned else None
    roles = Roles(backbone.transformer, lora, preset.distill.seed, fresh)
    hashed = model_hash(base, ema, (fresh or lora).alpha)
    for adapter, group in ((GENERATOR, EMA), *([(STAGE1_GENERATOR, STAGE1_GENERATOR)] if tuned else [])):
        try:
            roles.load(adapter, checkpoint.tensors.get(group, {}))
        except DataError as error:
            raise _foreign(checkpoint, group, error) from error
    if tuned:
        hashed = model_hash(hashed, checkpoint.tensors[STAGE1_GENERATOR], lora.alpha)
    return roles, hashed


def _foreign(checkpoint: Checkpoint, group: str, error: DataError) -> DataError:
    file = checkpoint.path / f"{group}.safetensors"
    return DataError(f"{file} belongs to another model. {error.message}", error.hint)


def weights_id(backbone: Backbone, preset: Preset) -> str:
    """Names the base's weights as they are computed with: another storage makes other pictures."""
    base, stored = backbone.model_id.hash, preset.hardware.base
    return base if stored == "plain" else f"{base} {stored}"


def model_hash(base: str, ema: Mapping[str, Tensor], alpha: int) -> str:
    """12 hexadecimal digits of sha256 over the base model's hash and a generator's scale and tensors."""
    total = hashlib.sha256(f"{base} {alpha}\n".encode())
    for name in sorted(ema):
        tensor = ema[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:12]

"""What `--from` names, and the model it stands for.

A name is looked up in this order: a path (a run folder, a checkpoint folder, an exported folder), the name of a run, a
preset (its untouched base model). Without `--from` it is the newest finished run, or else the built-in model. Of a run
the best checkpoint by its own held-out rewards is taken, where it names one, else the newest.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor

from rtdmd_cli.config.loader import load_preset, preset_names, preset_path
from rtdmd_cli.config.places import PATHS, is_gone
from rtdmd_cli.config.schema import SHARED_BASE, Preset
from rtdmd_cli.engine.backbones.base import Backbone
from rtdmd_cli.engine.backbones.families import load_backbone
from rtdmd_cli.engine.backbones.two_bases import TwoBases, bases_of
from rtdmd_cli.engine.rewards import needed
from rtdmd_cli.engine.roles.adapters import Roles
from rtdmd_cli.engine.roles.base import GENERATOR, STAGE1_GENERATOR
from rtdmd_cli.engine.roles.full import replace_weights
from rtdmd_cli.engine.sampling.sample import Kind, SamplingPlan, sampling_plan
from rtdmd_cli.engine.storage.checkpoint import (
    Checkpoint,
    checkpoint_steps,
    load_checkpoint,
    newest_valid,
    step_name,
    verify_checkpoint,
)
from rtdmd_cli.engine.storage.disk_errors import os_errors
from rtdmd_cli.engine.storage.exported import Exported, is_exported, read_exported
from rtdmd_cli.engine.storage.hub import REPOSITORY
from rtdmd_cli.engine.storage.lora_files import add_lora, read_lora
from rtdmd_cli.engine.storage.run_folder import RunFolder, find_newest_finished, is_run, open_run, resolve_run
from rtdmd_cli.errors import DataError, UsageError

DEFAULT_PRESET = "shapes-4step"
EMA = "ema"  # the checkpoint's group that a generator's pictures are made with
BEST, LAST = "best", "last"
LONGEST_NAME = 255  # characters of a file name


@dataclass(frozen=True)
class Source:
    """A generator (with its checkpoint) or a teacher (the preset's base model).

    preset: a generator's is its run's. label: a name for people and for results, without folders.
    notes: lines for stderr about what was chosen. exported: where the generator is an exported folder.
    """

    kind: Kind
    preset: Preset
    checkpoint: Path | None
    label: str
    notes: tuple[str, ...] = ()
    exported: Exported | None = None


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


def resolve(reference: str | None, out: Path, checkpoint: str | None = None) -> Source:
    """Find what `reference` names; `out` is the folder of the runs. Loads no model.

    checkpoint: of a run, "best", "last" or a step; None for the best where the run names one.
    UsageError where it names nothing, for an unknown checkpoint, and for a checkpoint of what is no run. DataError for a
    damaged run or checkpoint, or a run without any.
    """
    if checkpoint is not None and checkpoint not in (BEST, LAST) and not checkpoint.isdecimal():
        raise UsageError(f"`{checkpoint}` names no checkpoint.", "Give --checkpoint best, last or a step.")
    if reference is None:
        return _default(out, checkpoint)
    found = _in_folders(reference, out, checkpoint)
    if found is None and checkpoint is not None:
        raise UsageError(
            f"`{reference}` is no run, so that it has no checkpoints.", "Leave --checkpoint out."
        )
    if found is None:
        return _from_preset(reference, out)
    return replace(found, notes=(*_namesake(reference), *found.notes))


def _namesake(reference: str) -> list[str]:
    """A line where a preset bears the name of what was found among the runs."""
    if reference not in preset_names():
        return []
    return [f"`{reference}` is a run here; the base model of the preset is --from {preset_path(reference)}"]


def _in_folders(reference: str, out: Path, checkpoint: str | None) -> Source | None:
    """The run or checkpoint of that path or name; None if there is none."""
    path, there = Path(reference), bool(reference) and os.path.exists(reference)
    if not there and (path.name != reference or len(reference) > LONGEST_NAME):
        return None
    with os_errors(path, "read"):
        found = resolve_run(reference, out)
    if found is not None and found.checkpoint is None and found.run is not None:
        return _from_run(found.run, checkpoint)
    if checkpoint is not None and (found is not None or (there and is_exported(path))):
        raise UsageError(f"{reference} is no run, so that it has no checkpoints.", "Leave --checkpoint out.")
    if found is not None and found.checkpoint is not None:
        return _from_checkpoint(found.checkpoint, found.run)
    if there and is_exported(path):
        exported = read_exported(path)
        label = f"{path.resolve().name} (export)"
        return Source("generator", exported.preset, None, label, exported=exported)
    if there and path.is_dir():
        if path.resolve().parent.name == "checkpoints":
            verify_checkpoint(path)  # says what is missing
        if (path / "checkpoints").is_dir():
            open_run(path)  # likewise
    return None


def _default(out: Path, checkpoint: str | None) -> Source:
    run = find_newest_finished(out)
    if run is None and checkpoint is not None:
        raise UsageError(
            f"There is no finished run under {out}/.", "Name one with --from, or leave --checkpoint out."
        )
    if run is None:
        source = _from_preset(DEFAULT_PRESET, out)
        note = f"no finished run under {out}/: using the built-in model, untrained for few steps"
    else:
        source = _from_run(run, checkpoint)
        note = f"using {source.label}, the newest finished run under {out}/"
    return replace(source, notes=(note, *source.notes))


def _from_run(run: RunFolder, checkpoint: str | None) -> Source:
    """The checkpoint of a run that is asked for; damaged ones that are newer than the newest good one are named."""
    if checkpoint is not None and checkpoint.isdecimal():
        return _from_checkpoint(_at_step(run, int(checkpoint)), run)
    best = None if checkpoint == LAST else run.best_checkpoint
    if checkpoint == BEST and best is None:
        raise UsageError(
            f"{run.path} names no best checkpoint: no held-out reward was measured on the way.",
            "Leave --checkpoint out, or give --checkpoint last.",
        )
    if best is not None:
        verify_checkpoint(best)
        return _generator(best, run, _why(best, run))
    newest, skipped = newest_valid(run.checkpoints)
    if newest is None and skipped:
        raise DataError(
            f"{run.path} has no good checkpoint: {skipped[0][1]}", "Train it again, or take another run."
        )
    if newest is None:
        raise DataError(
            f"{run.path} has no checkpoint yet.",
            "Wait for its first one, or sample its base model by the preset's name.",
        )
    notes = tuple(f"skipped a damaged checkpoint: {reason}" for _, reason in skipped)
    return _generator(newest, run, notes)


def _why(best: Path, run: RunFolder) -> tuple[str, ...]:
    """A line where the best checkpoint is not the newest."""
    if checkpoint_steps(run.checkpoints)[-1:] == [int(best.name.removeprefix("step-"))]:
        return ()
    return (f"taking {best.name}, the best by the held-out rewards; the newest: --checkpoint last",)


def _at_step(run: RunFolder, step: int) -> Path:
    """The checkpoint of that step; UsageError, naming those there are, without it."""
    steps = checkpoint_steps(run.checkpoints)
    if step not in steps:
        there = ", ".join(str(each) for each in steps) or "none"
        raise UsageError(f"{run.path} has no checkpoint of step {step}.", f"There are: {there}.")
    return run.checkpoints / step_name(step)


def _from_checkpoint(path: Path, run: RunFolder | None) -> Source:
    verify_checkpoint(path)
    if run is None:
        raise DataError(
            f"The checkpoint {path} lies outside a run folder, so its preset is unknown.",
            "Put it back under RUN/checkpoints/, beside the run's preset.resolved.yaml.",
        )
    return _generator(path, run, ())


def _generator(checkpoint: Path, run: RunFolder, notes: tuple[str, ...]) -> Source:
    try:
        preset = load_preset(str(run.preset), environ={}).preset
    except UsageError as error:
        raise DataError(f"The run {run.path} is damaged: {error.message}", error.hint) from error
    for key in PATHS["model"]:
        place = preset.model.model_dump()[key]
        if is_gone(place):
            raise DataError(
                f"The run {run.path} was made with model.{key} {place}, where nothing is any more.",
                f"Write its new place into {run.preset}.",
            )
    return Source("generator", preset, checkpoint, f"{run.path.resolve().name}/{checkpoint.name}", notes)


def _from_preset(reference: str, out: Path) -> Source:
    named = _of_hub(reference)
    if named is not None:
        return named
    try:
        path = preset_path(reference)
    except UsageError as error:
        raise _unknown(reference, out) from error
    if not os.path.isfile(path):
        raise _unknown(reference, out)
    preset = load_preset(reference).preset
    return Source("teacher", preset, None, f"{preset.name} (base model)")


def _of_hub(reference: str) -> Source | None:
    """The base model that a hub id names, by the first shipped preset of it; None where there is none."""
    if not _is_hub_id(reference):
        return None
    for name in preset_names():
        preset = load_preset(name, environ={}).preset
        if preset.model.path == reference:
            note = f"{reference} as the preset {name} has it"
            return Source("teacher", preset, None, f"{reference} (base model)", (note,))
    return None


def _is_hub_id(reference: str) -> bool:
    file = reference.endswith((".yaml", ".yml")) or os.path.exists(reference)
    return re.fullmatch(REPOSITORY, reference) is not None and not file


def _unknown(reference: str, out: Path) -> UsageError:
    shown = reference if len(reference) <= 80 else reference[:77] + "..."
    names = preset_names()
    if out.is_dir():
        with os_errors(out, "list"):
            names += [path.name for path in out.iterdir() if is_run(path)]
    if _is_hub_id(reference):
        return UsageError(
            f"`{shown}` is neither a folder nor a model of a shipped preset.",
            f"For another hub model copy a preset of its family: --set model.path={shown} (rtdmd presets list).",
        )
    near = get_close_matches(reference, sorted(names), n=1)
    return UsageError(
        f"`{shown}` is no run or checkpoint folder, no exported folder, no run under {out}/, and no preset.",
        f"Did you mean `{near[0]}`?" if near else "List the shipped presets: rtdmd presets list",
    )


def refuse_guidance(source: Source, guidance: float | None) -> None:
    """UsageError for guidance on a generator, before anything is loaded."""
    if source.kind == "generator" and guidance not in (None, 1):
        raise UsageError("A generator is sampled without guidance.", "Leave --guidance out, or give 1.")


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

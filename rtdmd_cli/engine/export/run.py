"""One export, from a run to a finished folder: fold, write, prove, describe, and only then give it its name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtdmd_cli import __version__
from rtdmd_cli.config.schema import Preset
from rtdmd_cli.config.tune_reward import split_weights
from rtdmd_cli.engine.backbones.families import FAMILIES as BACKBONES
from rtdmd_cli.engine.backbones.loading import file_tensors
from rtdmd_cli.engine.compute.device import where_there_is_room
from rtdmd_cli.engine.export import PICTURES, merged
from rtdmd_cli.engine.export.card import card_text
from rtdmd_cli.engine.export.code import Place, Stock
from rtdmd_cli.engine.export.facts import Facts
from rtdmd_cli.engine.export.families import (
    FAMILIES,
    Bases,
    comfyui_knows,
    find_bases,
    generator_base,
    generator_revision,
    licence_of,
    row,
)
from rtdmd_cli.engine.export.fold import Folded, fold
from rtdmd_cli.engine.export.generator import adapter_stacks, is_full, is_tuned
from rtdmd_cli.engine.export.lora import lora_files, write_loras, write_workflows
from rtdmd_cli.engine.export.names import (
    export_name,
    is_hub_id,
    local_name,
    public_name,
)
from rtdmd_cli.engine.export.own import Own, counted, draw_own
from rtdmd_cli.engine.export.roundtrip import RoundTrip, compare, reloaded_pictures
from rtdmd_cli.engine.export.stock import stock_here, stock_there
from rtdmd_cli.engine.report.grid import GridRow, picture_grid, save_png
from rtdmd_cli.engine.roles.adapters import DTYPES
from rtdmd_cli.engine.sampling.model import EMA
from rtdmd_cli.engine.sampling.source import Source
from rtdmd_cli.engine.storage import files, strict_json
from rtdmd_cli.engine.storage.checkpoint import Checkpoint, load_checkpoint
from rtdmd_cli.engine.storage.disk_errors import os_errors
from rtdmd_cli.engine.storage.exported import (
    CARD,
    FORMAT,
    MANIFEST,
    VERSION,
    file_sha256,
    is_exported,
    is_untouched,
)
from rtdmd_cli.engine.storage.run_folder import RunFolder
from rtdmd_cli.engine.tune_reward.watch import BEFORE
from rtdmd_cli.errors import UsageError
from rtdmd_cli.shapes.prompts import benchmark

FORMATS = ("diffusers", "comfyui", "merged")
NO_COMFYUI = "ComfyUI can't load the built-in model: it knows no SD3 with 8 latent channels and heads of 32"
NO_ADAPTER = Folded({}, 0, 0, 0.0)
PROMPTS = (
    "a photo of a red bicycle leaning on a white wall",
    "an oil painting of a lighthouse in a storm",
    "a close-up portrait of an old fisherman in morning light",
    "a wooden sign with the words open daily",
)
"""What the pictures of a card show where the model isn't of the built-in world."""


@dataclass(frozen=True)
class Request:
    """What to export. formats: of FORMATS; out: the folder to make; where: what the card's code loads.

    rank: at most that, None for the exact one. check: run the round trip. stored: how the base was stored in training.
    pictures: how many the card shows and the round trip compares, 1 to PICTURES.
    """

    source: Source
    formats: tuple[str, ...]
    out: Path
    where: str
    rank: int | None
    check: bool
    force: bool
    device: torch.device
    dtype: torch.dtype
    stored: str = "plain"
    pictures: int = PICTURES


def run_export(request: Request, say: Callable[[str], None]) -> dict[str, Any]:
    """Make the folder; what export.json says of it. say: prints a line for people.

    UsageError for a target that may not be written, and BusyError where another process makes it, before anything is
    loaded; errors as `open_model`; NumericalError where an export doesn't make the run's pictures. After any error the
    target is as before.
    """
    request = prepared(request, say)
    check_target(request)
    files.make_folder(request.out.parent)
    files.remove_leftovers(request.out.parent, name=request.out.name)
    with files.building(request.out, fixed=True) as building:
        return _built(request, building, say)


def _built(request: Request, building: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Fill the folder `building` and give it its name; what export.json says of it."""
    assert request.source.checkpoint is not None
    prompts = picture_prompts(request.source)[: request.pictures]
    own = where_there_is_room(
        partial(draw_own, request.source, request.dtype, prompts, say), request.device, say
    )
    checkpoint = load_checkpoint(request.source.checkpoint)
    folded = NO_ADAPTER
    if not is_full(request.source.preset):
        stacks = adapter_stacks(request.source.preset, checkpoint)
        folded = fold(stacks, request.rank)
        say(_folded_line(folded, max(len(parts) for parts in stacks.values())))
    bases = find_bases(request.source.preset)
    facts = build(request, building, bases, checkpoint, folded, own, prompts, say)
    described = describe(request, building, facts)
    if not request.force:
        files.rename_folder(building, request.out)
        return described
    check_target(request)  # once more: building takes minutes
    changed = not is_untouched(request.out)
    aside = files.replace_folder(building, request.out, keep=changed)
    if aside is not None:
        say(f"{request.out} held files that no export wrote: it is kept as {aside}")
    return described


def default_formats(preset: Preset, rank: int | None) -> tuple[str, ...]:
    """The adapter; the pipeline where there is none, unless an adapter's rank was asked for, which `prepared` refuses."""
    return ("merged",) if is_full(preset) and rank is None else ("diffusers",)


def prepared(request: Request, say: Callable[[str], None]) -> Request:
    """The request as it can be met: whole weights as a pipeline alone, the base model unquantised, ComfyUI if it knows it.

    UsageError for an adapter of a generator that was trained in full, and for ComfyUI alone where it can't load the model.
    """
    preset, formats = request.source.preset, request.formats
    if is_full(preset) and formats != ("merged",):
        if "merged" not in formats or request.rank is not None:
            raise UsageError(
                "This generator was trained in full and has no adapter.",
                "Use --format merged, without --rank.",
            )
        say("trained in full: there is no adapter, the whole pipeline alone is written")
        formats = ("merged",)
    if "comfyui" in formats and not comfyui_knows(generator_base(preset)):
        if formats == ("comfyui",):
            raise UsageError(f"{NO_COMFYUI}.", "Use --format diffusers or merged.")
        say(f"{NO_COMFYUI}: nothing is written for it")
        formats = tuple(name for name in formats if name != "comfyui")
    plain = {"base": "plain", "vae_tiling": False, "text_encoder": "auto"}
    stored = preset.hardware.base
    if stored != "plain":
        say(f"trained on the base model in {stored}: exported for the plain one, which makes other pictures")
    exact = preset.model_copy(update={"hardware": preset.hardware.model_copy(update=plain)})
    return replace(request, formats=formats, stored=stored, source=replace(request.source, preset=exact))


def check_target(request: Request) -> None:
    """UsageError for a target that exists without --force, is no export, or is or holds what is read."""
    out, checkpoint = request.out, request.source.checkpoint
    assert checkpoint is not None
    bases = find_bases(request.source.preset)
    target = out.resolve()
    for read in (checkpoint, *bases.read):
        path = read.resolve()
        if path.is_relative_to(target) or target.is_relative_to(path):
            raise UsageError(f"{out} overlaps {read}, from which the export reads.", "Choose another --out.")
    with os_errors(out, "read"):
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
    if not out.is_dir() or not is_exported(out):
        raise UsageError(f"{out} exists and is no export of rtdmd.", "Choose another --out.")
    if not request.force:
        raise UsageError(f"{out} exists.", "Add --force to replace it, or choose another --out.")


def picture_prompts(source: Source) -> list[str]:
    """What the card's pictures show."""
    if source.preset.model.path != "builtin:shapes":
        return list(PROMPTS)
    captions = benchmark()
    return [captions[(2 * i + 1) * len(captions) // (2 * PICTURES)].text for i in range(PICTURES)]


def build(
    request: Request,
    folder: Path,
    bases: Bases,
    checkpoint: Checkpoint,
    folded: Folded,
    own: Own,
    prompts: Sequence[str],
    say: Callable[[str], None],
) -> Facts:
    """Write everything but the descriptions."""
    facts = gather(request, bases, checkpoint, folded, own, prompts)
    family = FAMILIES[facts.preset.model.family]
    if "merged" in facts.formats:
        full = is_full(facts.preset)
        changes = merged.full_changes(checkpoint.tensors[EMA]) if full else merged.lora_changes(folded)
        say("writing the whole pipeline")
        exact = merged.write_merged(
            folder,
            bases.pipeline,
            base_weights(bases, facts.preset, request.dtype),
            changes,
            own.sigmas,
            own.stock_already,
            family,
        )
        if not exact:
            say("the stock scheduler can't take the run's noise levels by itself: call it with sigmas=")
        facts = replace(facts, stock_schedule=exact)
    write_loras(folder, facts, family, folded)
    write_workflows(folder, facts)
    stock, trips = prove(request, folder, bases, facts, own, say) if request.check else (None, {})
    rows = [GridRow(f"rtdmd sample, eta {facts.preset.sampler.eta:g}", own.pictures)]
    rows += [GridRow("stock pipeline, Euler", stock)] if stock is not None else []
    save_png(picture_grid(rows, list(prompts)), folder / "samples.png", {"model_hash": own.model_hash})
    return replace(facts, trips=trips, files=_listing(folder))


def base_weights(bases: Bases, preset: Preset, dtype: torch.dtype) -> Path | dict[str, Tensor]:
    """What is merged into: a transformer's folder, or the weights of a single file, those in 8 bits as `dtype`."""
    if bases.file is None:
        assert bases.transformer is not None
        return bases.transformer
    layout = BACKBONES[preset.model.family].module().LAYOUT
    return file_tensors(layout, bases.file, bases.pipeline, dtype)


def gather(
    request: Request, bases: Bases, checkpoint: Checkpoint, folded: Folded, own: Own, prompts: Sequence[str]
) -> Facts:
    """What is known before anything is written."""
    preset = request.source.preset
    base = generator_base(preset)
    pipeline: str = strict_json.read(bases.pipeline / merged.INDEX)["_class_name"]
    return Facts(
        name=export_name(request.source.label),
        where=request.where,
        formats=request.formats,
        preset=preset,
        base=public_name(base),
        on_hub=is_hub_id(base),
        stock=stock_there(preset, bases, pipeline),
        stored=request.stored,
        base_hash=own.base_hash,
        licence=licence_of(base),
        loader=row(FAMILIES[preset.model.family].comfy, base),
        tuned=is_tuned(checkpoint),
        iterations=checkpoint.step,
        preset_sha256=checkpoint.meta.get("preset_sha256", "not recorded"),
        model_hash=own.model_hash,
        off=own.off,
        before=checkpoint.state.get("records", {}).get(BEFORE, {}),
        after=RunFolder(checkpoint.path.parent.parent).measured(checkpoint.step),
        sigmas=own.sigmas,
        rank=folded.rank,
        exact_rank=folded.exact_rank,
        fold_error=folded.error,
        stock_schedule=False,
        prompts=prompts,
    )


def prove(
    request: Request, folder: Path, bases: Bases, facts: Facts, own: Own, say: Callable[[str], None]
) -> tuple[Tensor, dict[str, RoundTrip]]:
    """Reload each format in the stock pipeline; the last one's pictures, and the differences."""
    trips, pictures, loras = {}, own.euler, lora_files(facts)
    base = stock_here(facts.preset, facts.stock, bases)
    for name in facts.formats:
        dtype = max(request.dtype, *adapter_dtypes(facts), key=rounding)  # adapters in bf16 compute in it
        if name == "merged":
            stock = Stock(facts.stock.pipeline, Place(str(folder)))
            stored = merged.stored_dtype(folder / merged.TRANSFORMER)
            dtype = max(dtype, stored, key=rounding)
        else:
            file = folder / loras[name]
            stock = replace(base, lora=(Place(str(file.parent)), file.name))
        say(f"round trip {name}: loading it into the stock pipeline, drawing the same pictures")
        call = facts.call(merged=name == "merged")
        drawn = partial(reloaded_pictures, stock, request.dtype, facts.prompts, call)
        pictures = where_there_is_room(drawn, request.device, say)
        trips[name] = compare(own.euler, pictures, dtype, facts.fold_error == 0, name)
        say(
            f"round trip {name}: mean difference {trips[name].mean:.2g}, largest {trips[name].largest:.2g} "
            f"over {counted(trips[name].pictures)}"
        )
    return pictures, trips


def adapter_dtypes(facts: Facts) -> list[torch.dtype]:
    """Number formats of the generator's adapters."""
    preset = facts.preset
    return [DTYPES[lora.dtype] for lora in (preset.distill.lora, preset.tune_reward.lora)]


def rounding(dtype: torch.dtype) -> float:
    """Relative rounding error of a number format."""
    return torch.finfo(dtype).eps


def describe(request: Request, folder: Path, facts: Facts) -> dict[str, Any]:
    """Write README.md and export.json; what the latter says."""
    card = card_text(facts)
    files.write_text(folder / CARD, card)
    preset = facts.preset.model_dump(mode="json")
    for key in ("path", "components", "generator_init"):
        preset["model"][key] = preset["model"][key] and local_name(preset["model"][key])
    described: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "rtdmd": __version__,
        "name": facts.name,
        "formats": list(facts.formats),
        "lora": next(iter(lora_files(facts).values()), None),
        "prefix": FAMILIES[facts.preset.model.family].prefix,
        "merged": "merged" in facts.formats,
        "stock_schedule": facts.stock_schedule,
        "base": {"name": facts.base, "revision": generator_revision(facts.preset), "hash": facts.base_hash},
        "model_hash": facts.model_hash,
        "trained_on": list(split_weights(facts.preset.tune_reward.rewards)) if facts.tuned else [],
        "preset": {key: preset[key] for key in ("name", "model", "sampler", "evaluate")},
        "sigmas": list(facts.sigmas),
        "rank": facts.rank,
        "exact_rank": facts.exact_rank,
        "fold_error": facts.fold_error,
        "level_rounding": facts.off,
        "round_trip": {name: trip.record() for name, trip in facts.trips.items()},
        "card_sha256": hashlib.sha256(card.encode()).hexdigest(),
        "files": {name: {"size": size, "sha256": sha} for name, (size, sha) in facts.files.items()},
    }
    files.write_json(folder / MANIFEST, described)
    return described


def _listing(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file but the descriptions."""
    inside = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.stat().st_size, file_sha256(path)) for path in inside}


def _folded_line(folded: Folded, stacked: int) -> str:
    if folded.error:
        return f"cut from rank {folded.exact_rank} to {folded.rank}: off by {folded.error:.2%} of the change's norm"
    adapters = "two stacked adapters" if stacked > 1 else "one adapter"
    return f"{adapters} of the generator as one LoRA of rank {folded.rank}, exactly"

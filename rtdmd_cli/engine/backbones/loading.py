"""What every family's loader does: find or download the folders, check them, load the networks, name the weights.

A family says with a `Layout` what its pipeline's folder holds; nothing here knows one family from another.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from safetensors import SafetensorError
from torch import nn

from rtdmd_cli.config.schema import SHARED_BASE, HardwareConfig, ModelConfig
from rtdmd_cli.engine.backbones.base import ModelId
from rtdmd_cli.engine.backbones.single_file import (
    DAMAGED,
    is_single_file,
    read_transformer,
    refuse_lora,
    refuse_other_kinds,
)
from rtdmd_cli.engine.backbones.two_bases import TwoBases, bases_of
from rtdmd_cli.engine.compute.quantise import place, shrink_encoder
from rtdmd_cli.engine.compute.quiet import quiet_loading
from rtdmd_cli.engine.compute.tiling import enable_tiling
from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.errors import DataError, EnvironmentFailure, UsageError

VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
BUILTIN = {"builtin:shapes": "shapes/weights/sd3"}  # folder inside the package
SINGLE_FILE = ".safetensors"
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
TRANSFORMER_FILES = ("transformer/*.json", f"transformer/*{SINGLE_FILE}")
DAMAGE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)
"""What the libraries raise over damaged files."""


@dataclass(frozen=True)
class Layout:
    """What the folder of a family's pipeline holds.

    pipeline: the class in diffusers. networks: component -> class; one is called "transformer", the text encoders
    begin with "text_encoder". tokenizers: names. optional: components that a pipeline may lack.
    """

    pipeline: Any  # the libraries' classes carry no types
    networks: Mapping[str, Any]
    tokenizers: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the text encoders."""
        return tuple(name for name in self.networks if name.startswith("text_encoder"))

    @property
    def renew(self) -> str:
        """The hint for a folder that is damaged or foreign."""
        return f"Fetch or save the model again, in the layout of diffusers' {self.pipeline.__name__}."


@dataclass(frozen=True)
class Sources:
    """Where the weights lie.

    folder: the pipeline. file: a transformer that takes the place of the folder's. generator: a folder whose
    `transformer/` is the generator's own base.
    """

    folder: Path
    file: Path | None = None
    generator: Path | None = None


class Loaded:
    """A pipeline in eval mode, frozen; `transformer` is its own, or a pair with the generator's own base."""

    def __init__(self, layout: Layout, config: ModelConfig, sources: Sources, pipe: Any) -> None:
        self.layout = layout
        self.config = config
        self.sources = sources
        self.pipe = pipe
        self.transformer: nn.Module = pipe.transformer
        self.encoders_in_8_bit = False

    @cached_property
    def _components(self) -> str:
        return folder_hash(self.layout, self.sources.folder, self.sources.file is None)

    @cached_property
    def model_id(self) -> ModelId:
        """One hash over everything that was loaded; a plain pipeline's is that of its folder."""
        parts, sources = [self._components], self.sources
        if sources.file is not None:
            parts.append(_file_hash(sources.file))
        if sources.generator is not None:
            parts.append(transformer_hash(sources.generator))
        total = parts[0] if len(parts) == 1 else hashlib.sha256(" ".join(parts).encode()).hexdigest()
        return ModelId(self.config.path, self.config.revision, total)

    def encoder_key(self, dtype: torch.dtype) -> str:
        """Names what the text encoders' results depend on besides prompt and text length."""
        stored = ":int8" if self.encoders_in_8_bit else ""
        return f"{self._components}:{self.config.revision}:{dtype}{stored}"


def load_pipeline(
    layout: Layout, config: ModelConfig, device: torch.device, dtype: torch.dtype, hardware: HardwareConfig
) -> Loaded:
    """Load the pipeline that `config` names: frozen, in eval mode, as `dtype`, the transformer and the VAE on
    `device` (the text encoders follow when they are first used).

    `config.path`: a built-in model's name, a .safetensors file with the transformer alone, an existing folder and a
    hub id are tried in that order; `revision` is the hub's. With a file, everything else comes from
    `config.components`. `config.generator_init`: see `TwoBases`. hardware: as `base.load_backbone`.
    EnvironmentFailure where the hub can't deliver it, DataError where a folder is missing, damaged or holds
    something else, UsageError for an unknown built-in model, and for a file without `components`.
    """
    sources = locate(layout, config)
    folder, present = sources.folder, check_layout(layout, sources.folder)
    try:
        with quiet_loading():
            networks = {
                name: load_network(layout, folder, name, dtype)
                for name in layout.networks
                if name in present and not (name == "transformer" and sources.file)
            }
            if sources.file:
                networks["transformer"] = load_file(layout, sources.file, folder, dtype)
            absent = dict.fromkeys(name for name in layout.optional if name not in present)
            pipe = layout.pipeline.from_pretrained(folder, dtype=dtype, **networks, **absent)
            loaded = Loaded(layout, config, sources, pipe)
            if sources.generator:
                generator = load_network(layout, sources.generator, "transformer", dtype)
                check_pair(pipe.transformer, generator, sources.generator)
                networks["generator"] = generator
                loaded.transformer = TwoBases(pipe.transformer, generator)
    except DAMAGE as error:
        raise DataError(
            f"The model in {folder} can't be loaded: {first_line(error)}", layout.renew
        ) from error
    for network in networks.values():
        network.eval().requires_grad_(False)
    if hardware.text_encoder == "int8":
        loaded.encoders_in_8_bit = True
        for name in layout.encoders:
            if name in networks:
                shrink_encoder(networks[name], device)
    for transformer in bases_of(loaded.transformer):
        place(transformer, hardware.base, device)
    pipe.vae.to(device)
    if hardware.vae_tiling:
        enable_tiling(pipe.vae)
    return loaded


def locate(layout: Layout, config: ModelConfig) -> Sources:
    """Find the folders and files that `config` names; what the hub has and this machine lacks is downloaded.

    Errors as `load_pipeline`, but nothing is read yet.
    """
    generator = None
    if config.generator_init != SHARED_BASE:
        generator = find_transformer(config.generator_init, config.generator_revision)
    if not is_single_file(config.path):
        return Sources(find_folder(layout, config.path, config.revision), None, generator)
    file = Path(config.path).expanduser()
    if file.is_file():
        try:
            refuse_lora(file)
        except DAMAGED as error:
            raise DataError(f"{file} can't be read: {first_line(error)}", "Fetch the file again.") from error
    else:
        raise DataError(f"There is no model file {config.path}.", "Check model.path.")
    if config.components is None:
        raise UsageError(
            f"{config.path} holds a transformer, and nothing says where the rest of the model is.",
            "Name the model it was tuned from, as in --set model.components=FOLDER_OR_HUB_ID",
        )
    rest = find_folder(layout, config.components, config.revision, "model.components", transformer=False)
    return Sources(rest, file, generator)


def find_folder(
    layout: Layout, path: str, revision: str | None, key: str = "model.path", transformer: bool = True
) -> Path:
    """The folder that holds a pipeline; downloads what is missing of a hub model. Errors as `load_pipeline`.

    key: the preset's key that names it. transformer: False to leave out the transformer's weights.
    """
    if path.startswith("builtin:"):
        if path not in BUILTIN:
            raise UsageError(f"There is no built-in model {path}.", f"Built in: {', '.join(BUILTIN)}.")
        return Path(str(files("rtdmd_cli"))) / BUILTIN[path]

    def download() -> str:
        if transformer:
            return str(layout.pipeline.download(path, revision=revision, use_safetensors=True))
        there = layout.pipeline.download(path, revision=revision, use_safetensors=True, transformer=None)
        hf_hub_download(path, "transformer/config.json", revision=revision)
        return str(there)

    return _folder_or_download(path, revision, key, download)


def find_transformer(path: str, revision: str | None) -> Path:
    """The folder whose `transformer/` is the generator's own base; of a hub model only that is downloaded."""

    def download() -> str:
        return snapshot_download(path, revision=revision, allow_patterns=list(TRANSFORMER_FILES))

    folder = _folder_or_download(path, revision, "model.generator_init", download)
    if not (folder / "transformer/config.json").is_file():
        raise DataError(f"The folder {folder} lacks transformer/config.json.", "Check model.generator_init.")
    return folder


def _folder_or_download(path: str, revision: str | None, key: str, download: Callable[[], str]) -> Path:
    refuse_other_kinds(path, key)
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path):
        moved = " If it was moved, set the new place." if Path(path).is_absolute() else ""
        raise DataError(f"There is no model folder {path}.", f"Check {key}.{moved}")
    try:
        return Path(download())
    except (OSError, HTTPError, RevisionResolutionError, HFValidationError) as error:
        raise _hub_failure(path, revision, key, error) from error


def _hub_failure(path: str, revision: str | None, key: str, error: Exception) -> EnvironmentFailure:
    """What went wrong with the hub and what to do about it."""
    cause = error.__cause__ or error  # diffusers wraps the hub's own error
    if isinstance(cause, GatedRepoError):
        return EnvironmentFailure(
            f"The model {path} is gated: its licence has to be accepted first.",
            f"Accept it on https://huggingface.co/{path}, then run `hf auth login`.",
        )
    if isinstance(cause, RepositoryNotFoundError):
        return EnvironmentFailure(
            f"There is no folder {path} here, and no public model of that name on the hub.",
            f"Check {key}; for a private model run `hf auth login`.",
        )
    if isinstance(cause, RevisionNotFoundError):
        return EnvironmentFailure(
            f"The model {path} has no revision {revision}.", f"Check {_revision_key(key)}."
        )
    if isinstance(cause, LocalEntryNotFoundError):
        return EnvironmentFailure(
            f"The model {path} is not in the local cache, and the hub can't be reached.",
            f"Check the network, unset HF_HUB_OFFLINE, or set {key} to a folder that holds the model.",
        )
    if isinstance(cause, OfflineModeIsEnabled):
        return EnvironmentFailure(
            f"The model {path} is not in the local cache, and the hub is switched off.",
            f"Unset HF_HUB_OFFLINE, or set {key} to a folder that holds the model.",
        )
    return EnvironmentFailure(
        f"The model {path} could not be fetched from the hub: {first_line(cause)}",
        f"Check network and disk space and try again, or set {key} to a folder that holds the model.",
    )


def _revision_key(key: str) -> str:
    return "model.generator_revision" if key == "model.generator_init" else "model.revision"


def check_layout(layout: Layout, folder: Path) -> set[str]:
    """Names of the pipeline's components in `folder`; DataError where it is no complete pipeline of the family.

    The libraries make up what is missing of a tokenizer or of the weights, in silence; hence this check, and
    the one in `load_network`.
    """
    try:
        index = strict_json.read(folder / "model_index.json")
    except FileNotFoundError:
        raise DataError(
            f"The folder {folder} holds no model: model_index.json is missing.", layout.renew
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder / 'model_index.json'} can't be read: {first_line(error)}", layout.renew
        ) from error
    found = index.get("_class_name") if isinstance(index, dict) else None
    if found != layout.pipeline.__name__:
        raise DataError(
            f"The folder {folder} holds a {found}, not a {layout.pipeline.__name__}.", layout.renew
        )
    scheduler = (index.get("scheduler") or [None, None])[-1]
    if scheduler != SCHEDULER:
        raise DataError(
            f"The scheduler in {folder} is a {scheduler}, whose noise levels are others than a {SCHEDULER}'s.",
            "Use the model with the scheduler it was published with.",
        )
    components = (*layout.networks, *layout.tokenizers)
    present = {name for name in components if index.get(name) not in (None, [None, None])}
    for name in components:
        needed = ("config.json",) if name in layout.networks else VOCABULARIES
        if name not in present and name in layout.optional:
            continue
        if not any((folder / name / file).is_file() for file in needed):
            raise DataError(f"The model in {folder} lacks {name}/{' or '.join(needed)}.", layout.renew)
    return present


def load_network(layout: Layout, folder: Path, name: str, dtype: torch.dtype) -> Any:
    """One network of the pipeline, from safetensors only; DataError for weights that are not there."""
    network, info = layout.networks[name].from_pretrained(
        folder, subfolder=name, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise DataError(
            f"The weights in {folder / name} are incomplete: {missing[0]} is missing.", layout.renew
        )
    return network


def load_file(layout: Layout, file: Path, folder: Path, dtype: torch.dtype) -> Any:
    """The transformer in a single file, with the keys of diffusers or of the original release.

    Its shape is that of `folder/transformer/config.json`. DataError for a file that holds no such transformer.
    """
    network = layout.networks["transformer"]
    try:
        tensors = read_transformer(file, network, network.load_config(folder, subfolder="transformer"), dtype)
        return network.from_single_file(tensors, config=str(folder), subfolder="transformer", dtype=dtype)
    except DAMAGED as error:
        raise DataError(
            f"{file} holds no transformer like that of {folder}: {first_line(error)}",
            "Check model.path and model.components: the file must be a fine-tune of that very model.",
        ) from error


def check_pair(teacher: Any, generator: Any, folder: Path) -> None:
    """DataError unless both transformers take the same latents and the same prompts."""
    for key in ("in_channels", "joint_attention_dim"):
        own, other = teacher.config[key], generator.config[key]
        if own != other:
            raise DataError(
                f"The transformer in {folder} doesn't go with the teacher's: {key} is {other}, not {own}.",
                "Set model.generator_init to a model of the same family and size, or to teacher.",
            )


def folder_hash(layout: Layout, folder: Path, transformer: bool = True) -> str:
    """The commit of a snapshot in the hub's cache, else sha256 of names and contents of the model's files.

    transformer: False to leave the transformer out.
    """
    names = [name for name in layout.networks if transformer or name != "transformer"]
    return _hash(folder, ["model_index.json"], [*names, *layout.tokenizers, "scheduler"])


def transformer_hash(folder: Path) -> str:
    """The same for a folder of which the transformer alone is used."""
    return _hash(folder, [], ["transformer"])


def hub_commit(folder: Path) -> str | None:
    """The commit of a snapshot in a cache of the hub; None for every other folder, whatever its name.

    ModelScope and others lay out downloads likewise, but under names such as `master`, which say nothing of the contents.
    """
    model = folder.parent.parent
    inside = folder.parent.name == "snapshots" and model.name.startswith("models--")
    known = inside and (model / "blobs").is_dir() and re.fullmatch("[0-9a-f]{40}", folder.name)
    return folder.name if known else None


def _hash(folder: Path, single: list[str], folders: list[str]) -> str:
    if hub_commit(folder) is not None:
        return folder.name
    total = hashlib.sha256()
    inside = [folder / name for name in single]
    for name in folders:
        inside += sorted(path for path in (folder / name).rglob("*") if path.is_file())
    for path in inside:
        total.update(f"{path.relative_to(folder).as_posix()} {_file_hash(path)}\n".encode())
    return total.hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: BaseException) -> str:
    """An error's own words, one line of at most 300 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__

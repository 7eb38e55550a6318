"""What the folder of a family's pipeline holds, whether it is whole, and the hash that names it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from rtdmd_cli.engine.compute.tiling import enable_tiling
from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.engine.storage.components import NAMES, weight_files
from rtdmd_cli.engine.storage.digests import file_digest
from rtdmd_cli.errors import DataError, EnvironmentFailure, machine_fault

VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
SINGLE_FILE = ".safetensors"
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
DAMAGE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)
"""What the libraries raise over damaged files."""


@dataclass(frozen=True)
class Layout:
    """What the folder of a family's pipeline holds.

    pipeline: the class in diffusers. networks: component -> class; one is called "transformer", the text encoders
    begin with "text_encoder". tokenizers: names. optional: components that a pipeline may lack. text_width: the key of the
    transformer's config with the width of a row of an encoded prompt. pooled: whether it has a part for the whole prompt too.
    clip_first: whether CLIP's rows come before the others.
    own_lengths: whether prompts keep lengths of their own (`Conditioning.lengths`). tile: lets the VAE decode piece by piece.
    """

    pipeline: Any  # the libraries' classes carry no types
    networks: Mapping[str, Any]
    tokenizers: tuple[str, ...]
    optional: tuple[str, ...] = ()
    text_width: str = "joint_attention_dim"
    pooled: bool = False
    clip_first: bool = False
    own_lengths: bool = False
    tile: Callable[[Any], None] = enable_tiling

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the text encoders."""
        return tuple(name for name in self.networks if name.startswith("text_encoder"))

    def pooled_width(self, config: Mapping[str, Any]) -> int | None:
        """By the transformer's config; None for a family without, whose published config may have the key all the same."""
        return config["pooled_projection_dim"] if self.pooled else None

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


@contextmanager
def readable_model(layout: Layout, folder: Path) -> Iterator[None]:
    """What the libraries raise over damaged files becomes DataError; EnvironmentFailure for one that may not be read.

    What the machine is to blame for passes as it is.
    """
    try:
        yield
    except DAMAGE as error:
        pass_on_machine_faults(error)
        _require_permission(folder)
        raise DataError(
            f"The model in {folder} can't be loaded: {first_line(error)}", layout.renew
        ) from error


def pass_on_machine_faults(error: Exception) -> None:
    """Raise what is behind an error of the libraries where that is the machine's: the files are not damaged then."""
    fault = machine_fault(error)
    if fault is not None:
        raise fault from None


def _require_permission(folder: Path) -> None:
    """EnvironmentFailure for a file that the user may not read: the libraries say that there is none."""
    for path in sorted(folder.rglob("*")):
        try:
            if path.is_file():
                path.open("rb").close()
        except PermissionError:
            raise EnvironmentFailure(
                f"Cannot read {path}: permission denied.", "Have its owner give you permission: chmod a+r"
            ) from None


def weight_names(folder: Path) -> set[str]:
    """Names of the weights in a component's folder, by the headers of its safetensors files; each file is whole.

    OSError where there are none, or one that an index names is missing; SafetensorError for a damaged one.
    """
    found: set[str] = set()
    paths = weight_files(folder)
    if not paths:
        raise FileNotFoundError(f"{folder.name} holds no {' and no '.join(NAMES)}")
    for path in paths:
        with safe_open(path, framework="pt") as file:
            found.update(file.keys())
    return found


def check_names(layout: Layout, folder: Path, transformer: nn.Module) -> None:
    """DataError where a weight that `transformer` has is not among those of `folder/transformer`."""
    with readable_model(layout, folder):
        missing = sorted(transformer.state_dict().keys() - weight_names(folder / "transformer"))
    if missing:
        raise incomplete(layout, folder / "transformer", missing[0])


def incomplete(layout: Layout, folder: Path, name: str) -> DataError:
    return DataError(f"The weights in {folder} are incomplete: {name} is missing.", layout.renew)


def check_pair(layout: Layout, teacher: Any, generator: Any, folder: Path) -> None:
    """DataError unless both transformers take the same latents and the same prompts."""
    for key in ("in_channels", layout.text_width):
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
    """The same for a folder whose transformer alone is used."""
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
        total.update(f"{path.relative_to(folder).as_posix()} {file_digest(path)}\n".encode())
    return total.hexdigest()


def first_line(error: BaseException) -> str:
    """An error's own words, one line of at most 300 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__

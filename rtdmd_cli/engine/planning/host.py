"""The host's memory while networks are loaded.

Files of weights are mapped: a network whose files have the format that it is used in takes no memory of its own until
it is on the card, or packed. The system may keep what it read of the files as long as there is room, and gives it
back at need; that is not counted. In another format, or in one that is not known, a network is counted whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from rtdmd_cli.config.places import is_single_file
from rtdmd_cli.config.schema import SHARED_BASE, ModelConfig
from rtdmd_cli.engine.backbones.layout import DAMAGE
from rtdmd_cli.engine.compute.device import DTYPES
from rtdmd_cli.engine.planning.configs import find_folder, published_format
from rtdmd_cli.engine.storage.components import weight_files

ON_A_CPU = "device cpu: what the card would hold is in the host's memory, beside what stands under host"
PROCESS = 2**30
"""The program and its libraries, bytes. An allowance; 0.6 GiB was seen with a CPU build of torch."""
NOTE = "host: files of weights are mapped; what the system keeps of them while there is room is not counted"
LOAD_ENCODERS = "load text encoders"
LOAD_TRANSFORMER = "load transformer"
BASES = TRANSFORMER, GENERATOR = "transformer", "generator"
"""The teacher's base, and the generator's own where there is one."""
FORMATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""As safetensors names them."""


def loading(
    model: ModelConfig,
    dtype: torch.dtype,
    bases: Mapping[str, int],
    encoders: Mapping[str, int],
    packed: bool,
    on_card: bool,
    held: int,
) -> dict[str, int]:
    """Bytes by phase of loading. bases (by TRANSFORMER and GENERATOR), encoders: what each one's weights are as loaded.

    packed: encoders shrink to 8 bits, one by one, on the card; on_card: they move there as they are.
    held: prompts and encoders that are there when the transformer comes.
    """
    known = formats(model, encoders)
    own = {name: size * (known.get(name) != dtype) for name, size in {**bases, **encoders}.items()}
    text = [own[name] for name in encoders]
    if packed:
        first = max(text)
    elif on_card:
        first = sum(text)
    else:  # read again and again, so that mapped ones had better stay in memory, too
        first = sum(encoders.values())
    base = max(own[name] for name in bases)
    return {LOAD_ENCODERS: PROCESS + first, LOAD_TRANSFORMER: PROCESS + held + base}


def formats(model: ModelConfig, encoders: Mapping[str, int]) -> dict[str, torch.dtype]:
    """Network -> the format of its files: by their headers where they are at hand, else as the repository has them.

    Left out: what is not known, and a base in a file of its own.
    """
    single = is_single_file(model.path)
    source = (model.components or "") if single else model.path
    found = _formats(source, model.revision, [*encoders, *([] if single else [TRANSFORMER])])
    if model.generator_init != SHARED_BASE:
        theirs = _formats(model.generator_init, model.generator_revision, [TRANSFORMER])
        if TRANSFORMER in theirs:
            found[GENERATOR] = theirs[TRANSFORMER]
    return found


def _formats(source: str, revision: str | None, names: list[str]) -> dict[str, torch.dtype]:
    folder, published = find_folder(source, revision), published_format(source)
    if folder is None:
        return dict.fromkeys(names, DTYPES[published]) if published else {}
    kinds = {name: set(_kinds(folder / name)) for name in names}
    return {
        name: FORMATS[kind]
        for name, found in kinds.items()
        for kind in found & FORMATS.keys()
        if len(found) == 1
    }


def _kinds(folder: Path) -> Iterator[str]:
    """Formats of the weights with two dimensions or more, which are the bulk of them, as safetensors names them."""
    try:
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no mapping
                    part = tensors.get_slice(name)
                    if len(part.get_shape()) > 1:
                        yield part.get_dtype()
    except DAMAGE:  # the run says so when it loads; until then nothing is known of it
        yield ""

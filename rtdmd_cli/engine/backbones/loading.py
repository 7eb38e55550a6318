"""What every family's loader does: check the folder, load each network when it is needed, name the weights.

A family says with a `Layout` what its pipeline's folder holds; nothing here knows one family from another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from rtdmd_cli.config.schema import HardwareConfig, ModelConfig
from rtdmd_cli.engine.backbones.base import ModelId
from rtdmd_cli.engine.backbones.layout import (
    Layout,
    Sources,
    check_layout,
    check_names,
    check_pair,
    first_line,
    folder_hash,
    incomplete,
    pass_on_machine_faults,
    readable_model,
    transformer_hash,
    weight_names,
)
from rtdmd_cli.engine.backbones.locating import locate
from rtdmd_cli.engine.backbones.single_file import DAMAGED, read_transformer
from rtdmd_cli.engine.backbones.sizes import check_sizes
from rtdmd_cli.engine.backbones.two_bases import TwoBases, bases_of
from rtdmd_cli.engine.compute.device import free_memory
from rtdmd_cli.engine.compute.float32_products import CPU, emulates_bf16, multiply_in_float32
from rtdmd_cli.engine.compute.quantise import place, shrink_encoder
from rtdmd_cli.engine.compute.quiet import quiet_loading
from rtdmd_cli.engine.storage.digests import file_digest
from rtdmd_cli.errors import DataError, RtdmdError


@dataclass(frozen=True)
class Opener:
    """How the networks of a pipeline are loaded, each when it is asked for: frozen, in eval mode, as `dtype`.

    present: components that the folder holds. hardware: tells in which format the base and the encoders are kept.
    """

    layout: Layout
    sources: Sources
    present: frozenset[str]
    device: torch.device
    dtype: torch.dtype
    hardware: HardwareConfig

    def network(self, name: str, folder: Path | None = None) -> Any:
        """One network of the pipeline's folder, or of another one."""
        where = folder or self.sources.folder
        with readable_model(self.layout, where), quiet_loading():
            if name == "transformer" and self.sources.file and folder is None:
                made = load_file(self.layout, self.sources.file, where, self.dtype)
            else:
                made = load_network(self.layout, where, name, self.dtype)
        return made.eval().requires_grad_(False)

    def encoder(self, name: str) -> Any:
        """A text encoder on the CPU, but for the layers in 8 bits, which are on `device`."""
        encoder = self.network(name)
        if self.hardware.text_encoder == "int8":
            shrink_encoder(encoder, self.device)
        elif emulates_bf16(CPU, self.dtype):
            multiply_in_float32(encoder)
        return encoder

    def vae(self) -> Any:
        """The VAE on `device`; on a CPU in float32, as its convolutions in bf16 can take three hundred times as long."""
        vae = self.network("vae").to(self.device)
        if self.device.type == "cpu":
            vae.float()
        if self.hardware.vae_tiling:
            self.layout.tile(vae)
        return vae

    def transformer(self) -> nn.Module:
        """The transformer on `device`, or the pair with the generator's own base, each loaded and quantised in turn."""
        teacher = self._placed(self.network("transformer"))
        if self.sources.generator is None:
            return teacher
        return TwoBases(teacher, self._placed(self.network("transformer", self.sources.generator)))

    def _placed(self, transformer: nn.Module) -> nn.Module:
        place(transformer, self.hardware.base, self.device)
        if emulates_bf16(self.device, self.dtype):
            multiply_in_float32(transformer)
        return transformer


class Loaded:
    """A pipeline, frozen and in eval mode.

    With an `opener` the pipeline holds the VAE and the tokenizers; text encoders and transformer come when they are
    first asked for, so that the former can leave before the latter comes. Until then `pipe.transformer` has its
    configuration and no weights. `transformer` is the pipeline's own, or a pair with the generator's own base.
    """

    def __init__(
        self, layout: Layout, config: ModelConfig, sources: Sources, pipe: Any, opener: Opener | None = None
    ) -> None:
        self.layout = layout
        self.config = config
        self.sources = sources
        self.pipe = pipe
        self.encoders_dropped = False
        self._opener = opener
        self._transformer: nn.Module | None = None if opener else pipe.transformer
        self._hashes = hashes_of(layout, sources)

    @property
    def transformer(self) -> nn.Module:
        """Loaded at the first call. DataError for damaged weights."""
        if self._transformer is None:
            assert self._opener is not None
            self._transformer = self._opener.transformer()
            self.pipe.register_modules(transformer=bases_of(self._transformer)[0])
        return self._transformer

    @transformer.setter
    def transformer(self, transformer: nn.Module) -> None:
        self._transformer = transformer

    def open_encoders(self) -> None:
        """Load the text encoders that are not there; RtdmdError after `drop_encoders`."""
        if self.encoders_dropped:
            raise RtdmdError(
                "The text encoders have been freed, so prompts can't be encoded any more.",
                "Encode all prompts before training starts.",
            )
        for name in self.layout.encoders:
            if self._opener and name in self._opener.present and self.pipe.components[name] is None:
                self.pipe.register_modules(**{name: self._opener.encoder(name)})

    def drop_encoders(self, device: torch.device) -> None:
        """Free the memory of the text encoders, on `device` too."""
        self.encoders_dropped = True
        self.pipe.register_modules(**dict.fromkeys(self.layout.encoders))
        free_memory(device)

    def hash_ahead(self) -> None:
        """Begin to read what `model_id` needs, file after file, while the networks load."""
        pool = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._hashes = [pool.submit(part).result for part in self._hashes]
        pool.shutdown(wait=False)

    @cached_property
    def _components(self) -> str:
        return self._hashes[0]()

    @cached_property
    def model_id(self) -> ModelId:
        """One hash over everything that is loaded; a plain pipeline has its folder's hash."""
        parts = [self._components, *(part() for part in self._hashes[1:])]
        total = parts[0] if len(parts) == 1 else hashlib.sha256(" ".join(parts).encode()).hexdigest()
        return ModelId(self.config.path, self.config.revision, total)

    def encoder_key(self, dtype: torch.dtype) -> str:
        """Names what the text encoders' results depend on besides prompt and text length."""
        in_8_bit = self._opener is not None and self._opener.hardware.text_encoder == "int8"
        return f"{self._components}:{self.config.revision}:{dtype}{':int8' if in_8_bit else ''}"


def hashes_of(layout: Layout, sources: Sources) -> list[Callable[[], str]]:
    """What gives the hash of the pipeline's folder, of the single file, of the generator's own base; the folder is first."""
    parts: list[Callable[[], str]] = [partial(folder_hash, layout, sources.folder, sources.file is None)]
    if sources.file is not None:
        parts.append(partial(file_digest, sources.file))
    if sources.generator is not None:
        parts.append(partial(transformer_hash, sources.generator))
    return parts


def load_pipeline(
    layout: Layout, config: ModelConfig, device: torch.device, dtype: torch.dtype, hardware: HardwareConfig
) -> Loaded:
    """The pipeline that `config` names: checked, its VAE loaded; the other networks follow, see `Loaded`.

    `config.path`: a built-in model's name, a .safetensors file with the transformer alone, an existing folder and a
    hub id are tried in that order; `revision` is the hub's. With a file, everything else comes from
    `config.components`. `config.generator_init`: see `TwoBases`. hardware: as `base.load_backbone`.
    EnvironmentFailure where the hub can't deliver it, DataError where a folder is missing, damaged or holds
    something else, UsageError for an unknown built-in model, and for a file without `components`.
    """
    sources = locate(layout, config)
    folder, present = sources.folder, check_layout(layout, sources.folder)
    opener = Opener(layout, sources, frozenset(present), device, dtype, hardware)
    with readable_model(layout, folder), quiet_loading():
        check_sizes(layout, folder)
        for name in layout.encoders:
            if name in present:
                weight_names(folder / name)
        transformer = empty_transformer(layout, folder)
        if sources.file:
            file_tensors(layout, sources.file, folder, dtype, shapes_only=True)  # whether it fits
        else:
            check_names(layout, folder, transformer)
        absent = dict.fromkeys(
            name
            for name in (*layout.encoders, *layout.optional)
            if name in layout.networks or name not in present
        )
        given = {"transformer": transformer, "vae": opener.vae()}
        pipe = layout.pipeline.from_pretrained(folder, dtype=dtype, **given, **absent)
    if sources.generator:
        own = empty_transformer(layout, sources.generator)
        check_pair(layout, transformer, own, sources.generator)
        check_names(layout, sources.generator, own)
    loaded = Loaded(layout, config, sources, pipe, opener)
    loaded.hash_ahead()
    return loaded


def empty_transformer(layout: Layout, folder: Path) -> Any:
    """The transformer that a folder's configuration describes, without memory for its weights."""
    kind = layout.networks["transformer"]
    with init_empty_weights(include_buffers=False):
        return kind.from_config(kind.load_config(folder, subfolder="transformer")).eval()


def load_network(layout: Layout, folder: Path, name: str, dtype: torch.dtype) -> Any:
    """One network of the pipeline, from safetensors only; DataError for weights that are not there."""
    network, info = layout.networks[name].from_pretrained(
        folder, subfolder=name, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise incomplete(layout, folder / name, missing[0])
    return network


def load_file(layout: Layout, file: Path, folder: Path, dtype: torch.dtype) -> Any:
    """The transformer in a single file, with the keys of diffusers or of the original release.

    Its shape is given by `folder/transformer/config.json`. DataError for a file that holds no such transformer.
    """
    network = layout.networks["transformer"]
    with readable_file(file, folder):
        tensors = file_tensors(layout, file, folder, dtype)
        return network.from_single_file(tensors, config=str(folder), subfolder="transformer", dtype=dtype)


def file_tensors(
    layout: Layout, file: Path, folder: Path, dtype: torch.dtype, shapes_only: bool = False
) -> dict[str, Tensor]:
    """The weights in a single file by diffusers' names, 8-bit ones as `dtype` with their scales; errors as `load_file`.

    shapes_only: as `read_transformer`.
    """
    network = layout.networks["transformer"]
    with readable_file(file, folder):
        config = network.load_config(folder, subfolder="transformer")
        return read_transformer(file, network, config, dtype, shapes_only)


@contextmanager
def readable_file(file: Path, folder: Path) -> Iterator[None]:
    """DataError for what the libraries raise over a file that is no transformer of the folder's model."""
    try:
        yield
    except DAMAGED as error:
        pass_on_machine_faults(error)
        raise DataError(
            f"{file} holds no transformer like that of {folder}: {first_line(error)}",
            "Check model.path and model.components: the file must be a fine-tune of that very model.",
        ) from error

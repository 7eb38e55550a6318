"""Encoded prompts on disk, so that a prompt is encoded once and training needs no text encoders.

    <folder>/<model>/<block>.safetensors    embeds [n, L, D], and pooled [n, P] and lengths [n] where the family has
                                            them; metadata: the rows' keys, sha256

A key is the sha256 of (model, text length, prompt). A block holds up to 64 prompts, so thousands of prompts
make few files, and a large model's block stays near 100 MB. Above `max_gb` the blocks that have not been used
for longest go first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from rtdmd_cli.engine.backbones.base import Backbone, Conditioning, concatenate
from rtdmd_cli.engine.compute.quiet import quiet_loading
from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.engine.storage.files import TMP_PREFIX, cache_folder, remove_leftovers, write_bytes
from rtdmd_cli.errors import EnvironmentFailure, UsageError

BLOCK = 64  # prompts
MEMORY_BYTES = 2_000_000_000
"""Encoded prompts up to this size are held in memory where the disk doesn't take them."""
DEFAULT_GB = 20.0

log = logging.getLogger(__name__)


def open_cache(backbone: Backbone, max_gb: float | None = None) -> EmbeddingCache:
    """The cache for a backbone, in RTDMD_CACHE or the user's cache folder, `max_gb` large at most.

    max_gb: None for RTDMD_CACHE_GB, or else 20.
    """
    bound = _max_gb() if max_gb is None else max_gb
    key, folder = backbone.encoder_key, cache_folder("embeddings")
    return EmbeddingCache(folder, key, backbone.text_length, bound, backbone.text_fits, backbone.excess)


def _max_gb() -> float:
    given = os.environ.get("RTDMD_CACHE_GB") or str(DEFAULT_GB)
    try:
        value = float(given)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UsageError(f"RTDMD_CACHE_GB must be a number of gigabytes above 0, not {given}.")
    return value


@dataclass(frozen=True)
class _Block:
    """An open block: it stays readable even if another process removes the file."""

    path: Path
    keys: tuple[str, ...]
    sha256: str
    tensors: Any  # safe_open
    family: str = ""  # of the model; "" where it isn't known


@dataclass(frozen=True)
class _Held:
    """A block in memory, read as `safe_open` reads one."""

    tensors: Mapping[str, torch.Tensor]

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_slice(self, name: str) -> torch.Tensor:
        return self.tensors[name]


_held: dict[Path, _Block] = {}
"""Blocks that the disk didn't take, of this process: whoever opens the cache again has them, as if they were there."""


class EmbeddingCache:
    """Prompts -> `Conditioning` by way of the disk: `ensure` first, then `fetch` whatever was ensured.

    model_key: names everything but text length (T5 tokens) and prompt that the embeddings depend on.
    max_gb: bound of the whole folder, all models together, in 10^9 bytes. fits: of the backbone (`text_fits`); a block that
    is of another family or of other widths is encoded again. excess: of the backbone; what it says of the prompts that are
    encoded goes into the log, in one line for each limit.
    """

    def __init__(
        self,
        folder: Path,
        model_key: str,
        text_length: int,
        max_gb: float = DEFAULT_GB,
        fits: Mapping[str, str | int] | None = None,
        excess: Callable[[Sequence[str]], Mapping[str, int]] = lambda prompts: {},
    ) -> None:
        self._root = folder
        self._folder = folder / hashlib.sha256(model_key.encode()).hexdigest()[:16]
        self._identity = (model_key, text_length)
        self._max_bytes = int(max_gb * 1e9)
        self._fits = dict(fits or {})
        self._excess = excess
        self._rows: dict[str, tuple[_Block, int]] = {}
        remove_leftovers(self._folder)

    def ensure(self, prompts: Sequence[str], encode: Callable[[Sequence[str]], Conditioning]) -> int:
        """Have all `prompts` on disk, encoding what is missing; returns how many were encoded.

        EnvironmentFailure where they need more than `max_gb`. What the disk doesn't take is held in memory, up to
        MEMORY_BYTES, which the log says. A damaged block is removed and its prompts are encoded again, likewise.
        """
        wanted = {self._key(prompt): prompt for prompt in prompts}
        self._find({key for key in wanted if key not in self._rows})
        missing = [(key, prompt) for key, prompt in wanted.items() if key not in self._rows]
        for start in range(0, len(missing), BLOCK):
            keys, texts = zip(*missing[start : start + BLOCK], strict=True)
            with quiet_loading():  # the libraries would list what they cut off, batch by batch
                encoded = encode(texts)
            self._write(keys, encoded)
        self._say_excess([prompt for _, prompt in missing])
        return len(missing)

    def renew(
        self, prompts: Sequence[str], encode: Callable[[Sequence[str]], Conditioning]
    ) -> Iterator[Sequence[str]]:
        """As `ensure`, block by block, and gives up all that was ensured before: for prompts that are needed in turns.

        Each block is there once its prompts come out. Rows that are on disk already are copied into new blocks, so that
        what is held are these prompts alone, and the bound counts nothing else.
        """
        wanted = {self._key(prompt): prompt for prompt in prompts}
        self._find({key for key in wanted if key not in self._rows})
        known, self._rows = self._rows, {}
        for path in {block.path for block, _ in known.values()}:
            _held.pop(path, None)
        everything = list(wanted)
        for start in range(0, len(everything), BLOCK):
            keys = tuple(everything[start : start + BLOCK])
            texts = [wanted[key] for key in keys]
            self._have_block(keys, texts, known, encode)
            yield texts

    def _have_block(
        self,
        keys: tuple[str, ...],
        texts: Sequence[str],
        known: Mapping[str, tuple[_Block, int]],
        encode: Callable[[Sequence[str]], Conditioning],
    ) -> None:
        """One block of `renew`."""
        if keys[0] in known and known[keys[0]][0].keys == keys:
            self._note(known[keys[0]][0])
            return
        missing = [text for key, text in zip(keys, texts, strict=True) if key not in known]
        if missing and self._find_block(keys):  # another process has made it meanwhile
            return
        rows: dict[str, Conditioning] = {}
        if missing:
            with quiet_loading():
                encoded = encode(missing).to("cpu")
            self._say_excess(missing)
            rows = {text: encoded.select([row]) for row, text in enumerate(missing)}
        copied = {text: self.fetch([text], known) for text in texts if text not in rows}
        self._write(keys, concatenate([(rows | copied)[text] for text in texts]))

    def capacity(self, row_bytes: int) -> int:
        """How many prompts of `row_bytes` each fit the bound, with what a block holds beside them."""
        return max(0, int((self._max_bytes - 1024) // (row_bytes + 128)))

    def fetch(
        self, prompts: Sequence[str], known: Mapping[str, tuple[_Block, int]] | None = None
    ) -> Conditioning:
        """The rows of `prompts`, in their order, on the CPU, in the dtype in which they were encoded.

        known: rows to look them up in, by default this run's.
        """
        rows = [(self._rows if known is None else known)[self._key(prompt)] for prompt in prompts]
        return concatenate([_row(block, row) for block, row in rows])

    def _say_excess(self, prompts: Sequence[str]) -> None:
        with quiet_loading():
            found = self._excess(prompts) if prompts else {}
        for limit, count in found.items():
            log.warning(
                "%d of %d prompts are longer than %s: their ends are cut off", count, len(prompts), limit
            )

    def _key(self, prompt: str) -> str:
        return hashlib.sha256(json.dumps([*self._identity, prompt]).encode()).hexdigest()

    def _find(self, wanted: set[str]) -> None:
        """Note the rows of all blocks that hold a wanted key; one on disk is verified first."""
        for held in _held.values():
            if held.path.parent == self._folder and not wanted.isdisjoint(held.keys):
                self._note(held)
        for path in sorted(_blocks(self._folder, "*.safetensors")):
            if wanted <= self._rows.keys():
                return
            block = _open(path)
            if block is not None and not wanted.isdisjoint(block.keys):
                self._take(block)

    def _find_block(self, keys: tuple[str, ...]) -> bool:
        """Note the block of exactly these keys, if it is on disk."""
        path = self._path(keys)
        block = _open(path) if path.exists() else None
        return block is not None and block.keys == keys and self._take(block)

    def _take(self, block: _Block) -> bool:
        """Note a block on disk if it is of this family, and intact."""
        if not self._fitting(block) or not _intact(block):
            return False
        with contextlib.suppress(OSError):  # a cache that can only be read is of use too
            os.utime(block.path)
        self._note(block)
        return True

    def _fitting(self, block: _Block) -> bool:
        """Whether a block is of this family and of its widths; one that isn't is removed."""
        widths = {name: block.tensors.get_slice(name).get_shape()[-1] for name in block.tensors.keys()}  # noqa: SIM118
        known = widths | ({"family": block.family} if block.family else {})
        wrong = [name for name, value in self._fits.items() if known.get(name, value) != value]
        if wrong:
            _discard(block.path, f"{wrong[0]} is {known[wrong[0]]}, not {self._fits[wrong[0]]}")
        return not wrong

    def _note(self, block: _Block) -> None:
        self._rows.update({key: (block, row) for row, key in enumerate(block.keys)})

    def _path(self, keys: tuple[str, ...]) -> Path:
        name = hashlib.sha256("".join(keys).encode()).hexdigest()[:24]
        return self._folder / f"{name}.safetensors"

    def _write(self, keys: tuple[str, ...], cond: Conditioning) -> None:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in cond.tensors.items()}
        metadata = {"keys": json.dumps(keys), "sha256": _digest(tensors)}
        metadata["family"] = str(self._fits.get("family", ""))
        data = save(tensors, metadata)
        self._make_room(len(data))
        path = self._path(keys)
        try:
            write_bytes(path, data)
        except EnvironmentFailure as error:
            self._hold(path, keys, data, error)
            return
        block = _open(path)
        assert block is not None, path
        self._note(block)

    def _hold(self, path: Path, keys: tuple[str, ...], data: bytes, error: EnvironmentFailure) -> None:
        """Keep a block that the disk didn't take in memory; raises `error` where that would be too much."""
        there = sum(tensor.nbytes for block in _held.values() for tensor in block.tensors.tensors.values())
        if there + len(data) > MEMORY_BYTES:
            raise error
        if not any(held.parent == self._folder for held in _held):
            log.warning("encoded prompts are held in memory, not in the cache: %s", error.message)
        tensors = load(data)
        _held[path] = _Block(path, keys, _digest(tensors), _Held(tensors))
        self._note(_held[path])

    def _make_room(self, size: int) -> None:
        """Remove the blocks unused for longest, but none of this run's, until `size` bytes more fit."""
        mine = {block.path for block, _ in self._rows.values()}
        blocks = sorted(_stat(self._root))
        total = sum(bytes_ for _, _, bytes_ in blocks) + size
        for _, path, bytes_ in blocks:
            if total > self._max_bytes and path not in mine:
                path.unlink(missing_ok=True)
                total -= bytes_
        if total > self._max_bytes:
            raise EnvironmentFailure(
                f"The encoded prompts need more than the {self._max_bytes / 1e9:g} GB of {self._root}.",
                "Raise hardware.cache_gb or RTDMD_CACHE_GB, or use fewer prompts.",
            )


def _row(block: _Block, row: int) -> Conditioning:
    names = block.tensors.keys()  # safe_open is no mapping
    return Conditioning(**{name: block.tensors.get_slice(name)[row : row + 1] for name in names})


def _blocks(folder: Path, pattern: str) -> list[Path]:
    """Finished blocks: what another process is writing just now has a temporary name."""
    return [path for path in folder.glob(pattern) if not path.name.startswith(TMP_PREFIX)]


def _stat(root: Path) -> list[tuple[int, Path, int]]:
    """(time of last use in ns, path, size in bytes) of every block under `root`."""
    found = []
    for path in _blocks(root, "*/*.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            status = path.stat()
            found.append((status.st_mtime_ns, path, status.st_size))
    return found


def _open(path: Path) -> _Block | None:
    """Open a block; a damaged one is removed, with a line on the log, and gives None."""
    try:
        tensors = safe_open(path, framework="pt")
        metadata = tensors.metadata() or {}
        keys = tuple(strict_json.parse(metadata["keys"]))
        names = set(tensors.keys())
        if "embeds" not in names or not names <= {each.name for each in fields(Conditioning)}:
            raise ValueError(f"tensors {sorted(names)}")
        rows = {tensors.get_slice(name).get_shape()[0] for name in names}
        if rows != {len(keys)}:
            raise ValueError(f"{len(keys)} keys for {rows} rows")
        return _Block(path, keys, metadata["sha256"], tensors, metadata.get("family", ""))
    except FileNotFoundError:
        return None  # removed by another process
    except OSError as error:
        raise EnvironmentFailure(f"The cached embeddings {path} can't be read: {error}") from error
    except (SafetensorError, ValueError, KeyError) as error:
        _discard(path, str(error))
        return None


def _intact(block: _Block) -> bool:
    """Whether the contents are those that were written; a damaged block is removed."""
    found = _digest({name: block.tensors.get_tensor(name) for name in block.tensors.keys()})  # noqa: SIM118
    if found != block.sha256:
        _discard(block.path, "its contents have changed")
    return found == block.sha256


def _discard(path: Path, reason: str) -> None:
    log.warning("cached embeddings %s are damaged (%s); they are encoded again", path, reason)
    path.unlink(missing_ok=True)


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(tensors[name].view(torch.uint8).numpy().tobytes())
    return total.hexdigest()

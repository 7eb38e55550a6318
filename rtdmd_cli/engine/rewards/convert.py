"""Weights that are published as pickles only: unpickled once, by the restricted loader, and kept as safetensors.

    <cache>/rewards/<name>-<16 digits>.safetensors    what was made of a pickle; the digits begin its sha256
    <cache>/rewards/sources/<24 digits>.json          of one pickle: where it lay, its state on disk, its sha256

A conversion belongs to the pickle's contents. While size, times and inode of a pickle are the recorded ones it is
not opened at all; else it is hashed, which runs nothing, and unpickled only if its contents have no conversion. So
- a pickle that was removed is not missed: the conversion of what was there last stands in for it;
- one that was replaced is never taken for the old one: it is converted itself, or refused;
- a file of the hub is looked up once; afterwards its conversion is used without asking the hub.
This is the only module that opens pickles.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.engine.storage.disk_errors import os_errors
from rtdmd_cli.engine.storage.files import cache_folder, remove_leftovers, write_json
from rtdmd_cli.engine.storage.hub import hub_file
from rtdmd_cli.engine.storage.tensor_files import write_tensors
from rtdmd_cli.engine.storage.tensors import AGAIN
from rtdmd_cli.errors import DataError, EnvironmentFailure

Convert: TypeAlias = Callable[[dict[str, Tensor]], dict[str, Tensor]]

log = logging.getLogger(__name__)

_SOURCE = "source_sha256"  # key in the metadata of a conversion


@dataclass(frozen=True)
class _Record:
    """state: of the file on disk, as `_state` gives it."""

    state: list[int]
    sha256: str


def converted_from(source: str, file: str, name: str, convert: Convert, entry: str = "") -> Path:
    """As `converted`, for `file` in a folder or a hub repository; errors of the hub as `hub_file`."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return converted(folder / file, name, convert, entry)
    key = f"hub:{source}/{file}"
    record = _read_record(key)
    if record is not None and _is_whole(_target(name, record.sha256), record.sha256):
        return _target(name, record.sha256)
    path = hub_file(source, file)
    target = converted(path, name, convert, entry)
    record = _read_record(_key(path))
    assert record is not None
    _write_record(key, record)
    return target


def converted(file: Path, name: str, convert: Convert, entry: str = "") -> Path:
    """The safetensors file that `convert` makes of the tensors in the pickle `file`, from the cache if it is there.

    name: of the conversion, letters, digits, dots and dashes; one name, one `convert`: change it with the layout.
    convert: {published key: tensor} -> {our key: tensor}; it checks the keys and shapes (`check_tensors`) and runs
    once. entry: the key under which the pickle holds the tensors, "" where it holds nothing else.

    DataError where `file` is missing (and no conversion of it is known), damaged, holds anything but tensors, or code,
    or is refused by `convert`; EnvironmentFailure where it can't be read or the cache can't be written.
    """
    assert re.fullmatch(r"[a-z0-9.-]+", name), name
    key, state = _key(file), _state(file)
    record = _read_record(key)
    if state is None:
        return _stand_in(file, name, record)
    known = record is not None and record.state == state
    if record is None or not known:
        record = _Record(state, _sha256(file))
    target = _target(name, record.sha256)
    if not _is_whole(target, record.sha256):
        tensors = convert(_load(file, entry))
        if _state(file) != state:
            raise DataError(f"The weights {file} changed while they were read.", "Try again.")
        _save(target, tensors, record.sha256)
    if not known:
        _write_record(key, record)
    return target


def _load(file: Path, entry: str) -> dict[str, Tensor]:
    """Unpickle with the restricted loader, which builds tensors and plain containers and runs nothing else."""
    try:
        with os_errors(file, "read"):
            loaded: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (EnvironmentFailure, MemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise nearly everything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise DataError(
                f"The weights {file} hold more than tensors ({refused[1]}); nothing of it was run.", AGAIN
            ) from error
        raise DataError(f"The weights {file} are damaged, or no weights at all.", AGAIN) from error
    if entry:
        if not isinstance(loaded, dict) or entry not in loaded:
            raise DataError(f"The weights {file} have no entry {entry}.", AGAIN)
        loaded = loaded[entry]
    if not isinstance(loaded, dict):
        raise DataError(f"The weights {file} hold a {type(loaded).__name__}, not named tensors.", AGAIN)
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise DataError(f"{key} of the weights {file} is a {type(value).__name__}, no tensor.", AGAIN)
    return {key: value.detach() for key, value in loaded.items()}


def _save(target: Path, tensors: dict[str, Tensor], sha256: str) -> None:
    own = _unshared(tensors)
    remove_leftovers(target.parent)
    write_tensors(target, own, {"format": "pt", _SOURCE: sha256})


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values, contiguous, with memory of their own where they shared it: safetensors demands both."""
    seen: set[int] = set()
    own = {}
    for key, tensor in tensors.items():
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        address = tensor.untyped_storage().data_ptr()
        own[key] = (
            tensor if whole and address not in seen else tensor.clone(memory_format=torch.contiguous_format)
        )
        seen.add(address)
    return own


def _stand_in(file: Path, name: str, record: _Record | None) -> Path:
    """The conversion of a pickle that isn't there any more."""
    if record is None:
        raise DataError(f"The weights {file} don't exist.", "Fetch them, or check the path of the reward.")
    target = _target(name, record.sha256)
    if not _is_whole(target, record.sha256):
        raise DataError(f"The weights {file} don't exist any more, nor does what was made of them.", AGAIN)
    return target


def _is_whole(target: Path, sha256: str) -> bool:
    """Whether `target` exists, has its full length (safetensors checks that) and was made of that pickle."""
    if not target.is_file():
        return False
    try:
        with os_errors(target, "read"), safe_open(target, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
    except SafetensorError as error:
        log.warning("the converted weights %s are damaged (%s); they are made again", target, error)
        return False
    return bool(metadata.get(_SOURCE) == sha256)


def _target(name: str, sha256: str) -> Path:
    return cache_folder("rewards") / f"{name}-{sha256[:16]}.safetensors"


def _key(file: Path) -> str:
    return os.path.abspath(file)


def _state(file: Path) -> list[int] | None:
    """Size, times and inode: they change whenever the file is written or replaced. None where there is none."""
    with os_errors(file, "read"):
        try:
            status = file.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _sha256(file: Path) -> str:
    with os_errors(file, "read"), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _record_path(key: str) -> Path:
    return cache_folder("rewards") / "sources" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def _read_record(key: str) -> _Record | None:
    """What is known of a source; nothing where its record is missing or unreadable: it is then hashed again."""
    try:
        content = strict_json.read(_record_path(key))
        return _Record([int(number) for number in content["state"]], str(content["sha256"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_record(key: str, record: _Record) -> None:
    write_json(_record_path(key), {"source": key, "state": record.state, "sha256": record.sha256})

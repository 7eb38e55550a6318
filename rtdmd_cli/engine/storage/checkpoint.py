"""Checkpoints: one folder per step, safetensors and JSON, never pickle.

    <folder>/step-000500/<group>.safetensors ...   tensors of each group: adapters, EMA, optimiser states
                         state.json                plain JSON: counters, optimiser scalars
                         manifest.json             format, step, meta, size and sha256 of each file

The same step, tensors, state and meta give the same bytes. A checkpoint is written beside its final name,
flushed to disk, read back and renamed; older ones go only after that. A kill at any moment leaves the old
set, or the old set and the new checkpoint. Newer ones are never removed: a run that goes on from an older checkpoint
moves them to <folder>/set-aside-<time>.

torch is imported by what saves and loads tensors: lists of runs read manifests alone, and must not wait for it.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtdmd_cli.engine.storage import files, strict_json
from rtdmd_cli.engine.storage.disk_errors import os_errors
from rtdmd_cli.errors import DataError, EnvironmentFailure

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "rtdmd-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"

SET_ASIDE = "set-aside-"

_STEP_NAME = re.compile(r"step-(\d{6}|[1-9]\d{6,})")
_GROUP_NAME = re.compile(r"[a-z0-9_-]+")
_FILE_NAME = re.compile(r"state\.json|[a-z0-9_-]+\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NO_SUCH_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_OTHER_HINT = "Choose another checkpoint; --resume auto takes the newest good one."


class RefusedCheckpoint(DataError):
    """A checkpoint that is whole but not to be trusted with its name or by this version: nothing takes its place."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint. tensors: {group: {name: CPU tensor}}; state: JSON values; meta: what made it.

    once: a training that puts it to use may `release` the tensors, as nobody else needs them.
    """

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    meta: dict[str, str]
    once: bool = False

    def release(self) -> None:
        """Let go of the tensors where that was allowed: of a full training they take tens of the host's gigabytes."""
        if self.once:
            self.tensors.clear()


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json. files: {file name: (bytes, sha256 in hexadecimal)}."""

    step: int
    files: dict[str, tuple[int, str]]
    meta: dict[str, str]


def step_name(step: int) -> str:
    """The folder's name of a step: step-000500."""
    return f"step-{step:06d}"


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    meta: Mapping[str, str],
    spared: int | None = None,
) -> Path:
    """Write <folder>/step-NNNNNN and remove older steps until `keep` are left, this one included.

    spared: a step that is left alone, and not counted.

    tensors: {group: {name: tensor of any shape, dtype, device}}, group of a-z, 0-9, _ and -. state: plain
    JSON (tuples and non-finite numbers are refused). meta: preset sha256, program version, base model.
    Steps above this one are left alone (see set_aside_after). A checkpoint of the same step is replaced.
    Only one process may write to `folder`. Raises ValueError for such arguments, EnvironmentFailure for disk and
    permission, and, before anything is written, where the tensors don't fit the disk.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step must be at least 0 and keep at least 1, got {step} and {keep}")
    files.make_folder(folder)
    files.remove_leftovers(folder, held=True)
    size = sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values())
    files.require_room(folder, size, f"The checkpoint {step_name(step)}")
    final = folder / step_name(step)
    with files.building(final) as temporary:
        written: dict[str, tuple[int, str]] = {}
        for name, data in _contents(tensors, state):
            files.write_bytes(temporary / name, data)
            written[name] = (len(data), hashlib.sha256(data).hexdigest())
            del data
        files.write_text(temporary / MANIFEST, _manifest_text(Manifest(step, written, dict(meta))))
        try:
            verify_checkpoint(temporary)
        except DataError as error:
            raise EnvironmentFailure(
                f"The disk gave back other bytes than were written: {error.message}",
                "Check the disk; the older checkpoints are untouched.",
            ) from error
        files.replace_folder(temporary, final)
    rotate(folder, step, keep, spared)
    return final


def _contents(
    tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Iterator[tuple[str, bytes]]:
    """The name and bytes of each file, one at a time. Raises ValueError for a bad group name or state."""
    text = files.json_text(dict(state))
    if strict_json.parse(text) != dict(state):
        raise ValueError("the state is not plain JSON: use dicts with text keys and lists, no tuples")
    import torch
    from safetensors.torch import save

    for group, named in sorted(tensors.items()):
        if not _GROUP_NAME.fullmatch(group):
            raise ValueError(f"a group's name is made of a-z, 0-9, _ and -, got {group!r}")
        # Cloned, because safetensors refuses tensors that share memory.
        copies = {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in named.items()
        }
        yield f"{group}.safetensors", save(copies)
    yield STATE, text.encode()


def _manifest_text(manifest: Manifest) -> str:
    """The text of manifest.json: no time stamps, and its own sha256 over everything else in it."""
    body: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "files": {name: {"size": size, "sha256": sha} for name, (size, sha) in manifest.files.items()},
        "meta": manifest.meta,
    }
    return files.json_text(body | {"sha256": _body_sha256(body)})


def _body_sha256(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(files.json_text(body).encode()).hexdigest()


def _step_folders(folder: Path) -> list[Path]:
    """The folders with a step's name, by step."""
    with os_errors(folder, "list"):
        if not folder.is_dir():
            return []
        found = [path for path in folder.iterdir() if _STEP_NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step that a folder's name says; it must be such a name."""
    match = _STEP_NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def rotate(folder: Path, step: int, keep: int, spared: int | None = None) -> None:
    """Remove the oldest of the steps before `step` until `keep` are left, this one included; not `spared`."""
    older = [path for path in _step_folders(folder) if step_of(path) < step and step_of(path) != spared]
    for path in older[: max(0, len(older) - (keep - 1))]:
        files.remove_folder(path)


def set_aside_after(folder: Path, step: int) -> Path | None:
    """Move the checkpoints of steps above `step` to a new folder in `folder`, which is returned; None where there are none.

    For a resume from an older checkpoint: otherwise the newest one belongs to the course that was given up.
    """
    later = [path for path in _step_folders(folder) if step_of(path) > step]
    if not later:
        return None
    when = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    aside = folder / f"{SET_ASIDE}{when}-{secrets.token_hex(2)}"
    files.make_folder(aside)
    for path in reversed(later):
        files.move(path, aside / path.name)
    return aside


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps that have a folder, rising; nothing is verified. Empty if `folder` does not exist."""
    return sorted({step_of(path) for path in _step_folders(folder)})


def newest_valid(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, and the newer ones that were skipped, each with the reason.

    (None, []) if there is no checkpoint at all. Raises EnvironmentFailure if one can't be read, which is no damage, and
    RefusedCheckpoint for one of another version, or whose folder has another step's name: no older one is taken then.
    """
    skipped: list[tuple[Path, str]] = []
    for path in reversed(_step_folders(folder)):
        try:
            verify_checkpoint(path)
        except RefusedCheckpoint:
            raise
        except DataError as error:
            skipped.append((path, error.message))
        else:
            return path, skipped
    return None, skipped


def verify_checkpoint(path: Path) -> Manifest:
    """Read every file of a checkpoint and compare it with the manifest. Errors as `load_checkpoint`."""
    manifest = _read_manifest(path)
    for name in manifest.files:
        _read_verified(path, name, manifest)
    return manifest


def load_checkpoint(path: Path, once: bool = False) -> Checkpoint:
    """Load a checkpoint; what is returned is what was verified (each file is read once). once: see `Checkpoint`.

    Raises DataError naming the file and the reason: missing, wrong size, wrong sha256, damaged or foreign
    manifest; RefusedCheckpoint: unknown version, another step's name. Raises EnvironmentFailure if a file can't be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    manifest = _read_manifest(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Any] = {}
    for name in manifest.files:
        data = _read_verified(path, name, manifest)
        try:
            if name == STATE:
                state = strict_json.parse(data)
            else:
                tensors[name.removesuffix(".safetensors")] = load(data)
        except (ValueError, SafetensorError) as error:
            raise DataError(f"{path / name} cannot be parsed: {error}.", _OTHER_HINT) from error
    return Checkpoint(path, manifest.step, tensors, state, manifest.meta, once)


def _read(path: Path, missing: str) -> bytes:
    try:
        with os_errors(path, "read"):
            return path.read_bytes()
    except EnvironmentFailure as error:
        if isinstance(error.__cause__, _NO_SUCH_FILE):
            raise DataError(missing, _OTHER_HINT) from error
        raise


def _read_verified(path: Path, name: str, manifest: Manifest) -> bytes:
    size, sha256 = manifest.files[name]
    data = _read(path / name, f"{path / name} is missing.")
    if len(data) != size:
        raise DataError(f"{path / name} has {len(data)} bytes instead of {size}.", _OTHER_HINT)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"{path / name} is damaged: its sha256 is not the manifest's.", _OTHER_HINT)
    return data


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    with os_errors(path, "read"):
        there = path.is_dir()
    if not there:
        raise DataError(f"There is no checkpoint folder {path}.", _OTHER_HINT)
    data = _read(file, f"{path} is foreign, no checkpoint of rtdmd: {MANIFEST} is missing.")
    try:
        body = strict_json.parse(data)
    except ValueError as error:
        raise DataError(f"{file} is damaged: {error}.", _OTHER_HINT) from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise DataError(
            f"{path} is foreign, no checkpoint of rtdmd: {MANIFEST} is of another program.", _OTHER_HINT
        )
    if body.get("version") != VERSION:
        raise RefusedCheckpoint(
            f"{file} has format version {body.get('version')}; this program reads version {VERSION}.",
            "Use the version of rtdmd that wrote it, or move the folder away.",
        )
    if body.pop("sha256", None) != _body_sha256(body):
        raise DataError(f"{file} is damaged: its own sha256 does not fit.", _OTHER_HINT)
    manifest = _parse_manifest(body, file)
    if _STEP_NAME.fullmatch(path.name) and step_of(path) != manifest.step:
        raise RefusedCheckpoint(
            f"{path} is a checkpoint of step {manifest.step}: its folder has another step's name.",
            f"Name it {step_name(manifest.step)}, or move it away.",
        )
    return manifest


def _parse_manifest(body: Mapping[str, Any], file: Path) -> Manifest:
    """The manifest of a dict whose hash fits. DataError if it was made by hand and lacks something."""
    try:
        entries = {str(name): (int(e["size"]), str(e["sha256"])) for name, e in body["files"].items()}
        manifest = Manifest(int(body["step"]), entries, {str(k): str(v) for k, v in body["meta"].items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{file} is damaged: it lacks a field or has one of another type.", _OTHER_HINT
        ) from error
    named_well = all(_FILE_NAME.fullmatch(n) and _SHA256.fullmatch(sha) for n, (_, sha) in entries.items())
    if STATE not in entries or not named_well:
        raise DataError(f"{file} is damaged: its list of files is not one of rtdmd.", _OTHER_HINT)
    return manifest

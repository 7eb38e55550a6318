"""What of a reward is on this machine: the hub's cache and the installed packages. No network, no torch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import constants

from rtdmd_cli.engine.rewards.base import Need, RewardEntry
from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.engine.storage.components import INDEX

EXTRAS = {"ocr": ("rapidocr", "onnxruntime")}
"""Optional dependency -> the modules it brings."""
WEIGHTS = (".bin", ".onnx", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class Missing:
    """Something a reward needs that isn't here. what: for a message; get: the command that fetches it."""

    what: str
    get: str


def missing(entry: RewardEntry) -> list[Missing]:
    """What has to be fetched or installed before the reward can be loaded from its default sources."""
    found = []
    if entry.extra and not extra_installed(entry.extra):
        package = f"rtdmd[{entry.extra}]"
        found.append(Missing(f"the package {EXTRAS[entry.extra][0]}", f"pip install '{package}'"))
    for need in entry.needs:
        if not at_hand(need):
            what = f"{need.source} ({readable(need.size)}) is not in the local cache"
            wanted = " ".join(f"--include {shlex.quote(file)}" for file in need.files)
            found.append(Missing(what, f"hf download {need.source} {wanted}"))
    return found


def extra_installed(extra: str) -> bool:
    """Whether every module of the optional dependency can be found."""
    return all(find_spec(module) is not None for module in EXTRAS[extra])


def at_hand(need: Need) -> bool:
    """Whether the weights lie in the hub's cache; what belongs to the package itself (source "") always does.

    Every pattern that names weights has a file, and where an index lists the weight files, all of them. Of the
    other files some are there, as loaders fetch only those they read.
    """
    if not need.source:
        return True
    names = cached_files(need.source)
    weights = [pattern for pattern in need.files if pattern.endswith(WEIGHTS)]
    if not weights:
        return bool(_matching(names, need.files))
    try:
        parts = {part for name, path in names.items() if name.endswith(INDEX) for part in _parts(path)}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):  # a damaged index
        return False
    return all(_matching(names, [pattern]) for pattern in weights) and parts <= names.keys()


def cached_files(repository: str) -> dict[str, Path]:
    """Name -> path of the files of a hub repository's main revision in the local cache; nothing if it isn't there.

    Found by the cache's layout, models--OWNER--NAME/refs/main and snapshots/COMMIT, as `snapshot_download` does; but
    importing that takes longer than all else that lists the rewards.
    """
    place = cache_folder(repository)
    try:
        folder = place / "snapshots" / (place / "refs" / "main").read_text("utf-8").strip()
    except OSError:
        return {}
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def cache_folder(repository: str) -> Path:
    """Where the hub's client keeps a repository, "owner/name"."""
    return Path(constants.HF_HUB_CACHE) / "--".join(["models", *repository.split("/")])


def readable(size: int) -> str:
    """Bytes as "276.7 MB"; powers of 1000."""
    value, units = float(size), ["B", "kB", "MB", "GB"]
    while value >= 999.95 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def _matching(names: dict[str, Path], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def _parts(index: Path) -> set[str]:
    """The weight files that an index names."""
    return set(strict_json.read(index)["weight_map"].values())

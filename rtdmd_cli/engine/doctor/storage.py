"""Host memory, folders, free disk, and the login of the hub."""

import os
import shutil
from pathlib import Path

from huggingface_hub import constants, get_token

from rtdmd_cli.engine.compute.host import GIB, host_memory
from rtdmd_cli.engine.doctor.check import Check
from rtdmd_cli.engine.storage.files import cache_folder

MEMORY = (2.0, 16.0)
"""GiB of host memory: below the first the built-in model may not train, below the second no published model loads."""
FREE = (2.0, 40.0)
"""GiB of free disk: below the first a run can't be saved, below the second no large model can be downloaded."""


def memory() -> Check:
    """Memory of the host, what is free of it now."""
    found = host_memory()
    if found is None:
        return Check("memory", "WARN", "unknown: this system doesn't tell", "16 GiB are needed for SD3.")
    total, free = found.total / GIB, found.available / GIB
    where = " (the container's bound)" if found.limited else ""
    line = f"{free:.1f} of {total:.1f} GiB free{where}"
    facts = {"total_gib": round(total, 2), "available_gib": round(free, 2), "limited": found.limited}
    least, wanted = MEMORY
    if free < least:
        return Check("memory", "FAIL", line, "Close other programs.", facts)
    if free < wanted:
        fix = f"Published models want {wanted:g} GiB free: close other programs, or use a larger machine."
        return Check("memory", "WARN", line, fix, facts)
    return Check("memory", "PASS", line, facts=facts)


def cache() -> Check:
    """Our own cache: encoded prompts, prompt sets, converted rewards."""
    return _folder("cache", cache_folder("."), FREE[0], "Set RTDMD_CACHE to a folder on a larger disk.")


def models() -> Check:
    """The hub's cache, where models lie."""
    return _folder(
        "models", Path(constants.HF_HUB_CACHE), FREE[1], "Set HF_HOME to a folder on a larger disk."
    )


def runs() -> Check:
    """The folder in which runs are made by default."""
    return _folder("runs", Path("runs"), FREE[0], "Give --out a folder on a larger disk.")


def _folder(name: str, path: Path, wanted: float, fix: str) -> Check:
    """Whether it can be written, and how much room its disk has; WARN below `wanted` GiB, FAIL below FREE[0]."""
    path = Path(os.path.abspath(path.expanduser()))
    there = next(each for each in (path, *path.parents) if each.exists())
    free, size = shutil.disk_usage(there).free / GIB, _size(path) / GIB
    line = f"{path}: {size:.1f} GiB, {free:.1f} GiB free on its disk"
    facts = {"path": str(path), "size_gib": round(size, 3), "free_gib": round(free, 2)}
    if not os.access(there, os.W_OK):
        return Check(
            name, "FAIL", f"{path} can't be written", fix.replace("on a larger disk", "of yours"), facts
        )
    if free < FREE[0]:
        return Check(name, "FAIL", line, fix, facts)
    if free < wanted:
        return Check(name, "WARN", line, fix, facts)
    return Check(name, "PASS", line, facts=facts)


def _size(path: Path) -> int:
    """Bytes of the files below `path`; links are not followed."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:  # another process has just removed it
                continue
    return total


def hub() -> Check:
    """Whether a token is there (never which), and whether the hub may be asked at all."""
    logged_in, offline = get_token() is not None, constants.HF_HUB_OFFLINE
    facts = {"token": logged_in, "offline": offline, "endpoint": constants.ENDPOINT}
    found = "a token is stored, not tried" if logged_in else "not logged in"
    if offline:
        return Check(
            "hub", "WARN", f"{found}; HF_HUB_OFFLINE is set", "To download: unset HF_HUB_OFFLINE", facts
        )
    if not logged_in:
        fix = "For models whose licence has to be accepted (SD3, FLUX.1-dev): hf auth login"
        return Check("hub", "WARN", found, fix, facts)
    return Check("hub", "PASS", found, facts=facts)

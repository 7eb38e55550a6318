"""The memory of the host: how much there is, and how much of it a process may still take."""

from dataclasses import dataclass
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
GIB = 2**30


@dataclass(frozen=True)
class HostMemory:
    """In bytes. limited: a container's bound is below the machine's memory."""

    total: int
    available: int
    limited: bool = False


@dataclass(frozen=True)
class _Files:
    """Of a container's memory, below the folder of cgroups. reclaimable: the key in `statistics`."""

    bound: str
    used: str
    statistics: str
    reclaimable: str


_VERSIONS = (
    _Files("memory.max", "memory.current", "memory.stat", "inactive_file"),
    _Files(
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Version 2 of cgroups, and version 1."""


def host_memory(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> HostMemory | None:
    """Linux's figures, bounded by the container's if there is one; None on other systems."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kib = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines)}
    total, available = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    for version in _VERSIONS:
        bound = _number(cgroup / version.bound)
        if bound is not None and bound < total:
            return HostMemory(bound, min(available, max(0, bound - _used(cgroup, version))), limited=True)
    return HostMemory(total, available)


def _used(cgroup: Path, version: _Files) -> int:
    """Bytes that a container holds; not the files read that the system drops where memory is wanted, as Docker counts."""
    used = _number(cgroup / version.used) or 0
    try:
        lines = (cgroup / version.statistics).read_text(encoding="ascii").splitlines()
    except OSError:
        return used
    counts = dict(line.split(maxsplit=1) for line in lines)
    return max(0, used - int(counts.get(version.reclaimable, 0)))


def _number(path: Path) -> int | None:
    """The whole number in a file; None where there is none, or it says "max"."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None

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


def host_memory(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> HostMemory | None:
    """Linux's figures, bounded by the container's if there is one; None on other systems."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kib = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines)}
    total, available = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    bound, used = (_number(cgroup / name) for name in ("memory.max", "memory.current"))
    if bound is None or bound >= total:
        return HostMemory(total, available)
    return HostMemory(bound, min(available, max(0, bound - (used or 0))), limited=True)


def _number(path: Path) -> int | None:
    """The whole number in a file; None where there is none, or it says "max"."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None

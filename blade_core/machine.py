"""Cores and main memory that this process may use, by the system and by the container it is in."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_PLENTY = 2**60
_GROUP = Path("/sys/fs/cgroup")
"""A container's own control group; on a machine without one, files are missing there."""


def cores(group: Path = _GROUP) -> int:
    """Cores that this process may use at once, at least one.

    Source: cpu.max of https://docs.kernel.org/admin-guide/cgroup-v2.html, and cfs_quota_us of
    https://docs.kernel.org/scheduler/sched-bwc.html before it.
    """
    found = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        found = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        return max(1, min(found, int(quota) // int(period)))  # a ValueError for "max"
    older = [_number(group / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    if all(number is not None and number > 0 for number in older):  # -1 is none
        return max(1, min(found, (older[0] or 0) // (older[1] or 1)))
    return found


def free_memory(group: Path = _GROUP, system: Path = Path("/proc/meminfo")) -> int:
    """Bytes of main memory that can be had, or very many where nobody says."""
    found = _PLENTY
    with suppress(OSError, ValueError, IndexError):
        for line in system.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found = int(line.split()[1]) * 2**10
    older = group / "memory"
    for folder, most, used, cache in (
        (group, "memory.max", "memory.current", "inactive_file"),
        (older, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, current = _number(folder / most), _number(folder / used)
        if limit is not None and current is not None:
            found = min(found, max(0, limit - current + _stat(folder / "memory.stat", cache)))
    return found


def _number(path: Path) -> int | None:
    with suppress(OSError, ValueError):  # "max" is no limit
        return int(path.read_text())
    return None


def _stat(path: Path, name: str) -> int:
    """What of a group's memory are files that were read, and can be given up."""
    with suppress(OSError, ValueError, IndexError):
        for line in path.read_text().splitlines():
            if line.split()[0] == name:
                return int(line.split()[1])
    return 0

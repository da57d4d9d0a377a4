"""Cores and memory, by the system's files and a container's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blade.blade_core.machine import cores, free_memory

GIB = 2**30


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 16),
        ({"cpu.max": "max 100000\n"}, 16),
        ({"cpu.max": "450000 100000\n"}, 4),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, 16),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 16),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ],
)
def test_cores(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert cores(write(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 100 * GIB),
        ({"memory.max": "max\n", "memory.current": f"{5 * GIB}\n"}, 100 * GIB),
        ({"memory.max": f"{24 * GIB}\n", "memory.current": f"{5 * GIB}\n"}, 19 * GIB),
        (
            {
                "memory.max": f"{24 * GIB}\n",
                "memory.current": f"{20 * GIB}\n",
                "memory.stat": f"anon 7\ninactive_file {8 * GIB}\n",
            },
            12 * GIB,
        ),
        ({"memory.max": f"{4 * GIB}\n", "memory.current": f"{5 * GIB}\n"}, 0),
        (
            {
                "memory/memory.limit_in_bytes": f"{24 * GIB}\n",
                "memory/memory.usage_in_bytes": f"{20 * GIB}\n",
                "memory/memory.stat": f"cache 9\ntotal_inactive_file {GIB}\n",
            },
            5 * GIB,
        ),
        (
            {
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/memory.usage_in_bytes": f"{20 * GIB}\n",
            },
            100 * GIB,
        ),
    ],
)
def test_free_memory(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    system = tmp_path / "meminfo"
    system.write_text(f"MemTotal:  1 kB\nMemAvailable:  {100 * 2**20} kB\n")
    assert free_memory(write(tmp_path / "group", files), system) == expected


def test_where_nobody_says(tmp_path: Path) -> None:
    assert free_memory(tmp_path, tmp_path / "meminfo") == 2**60
    assert 1 <= cores(tmp_path) <= (os.cpu_count() or 1)


def test_this_machine() -> None:
    assert 2**28 < free_memory() <= 2**60
    assert cores() >= 1

"""How many processes compile."""

from __future__ import annotations

import os

import pytest
import torch
from blade_tests.unit.samples import CPU

from blade.blade_core import pool
from blade.blade_core.engine import Engine
from blade.blade_core.errors import InvalidChoice
from blade.blade_core.pool import worker_count
from blade.blade_core.worker import FORKS


def test_how_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLADE_COMPILE_WORKERS", "2")
    assert worker_count(CPU) == 2
    assert Engine().jobs.pays(CPU)  # the user says so
    monkeypatch.setenv("BLADE_COMPILE_WORKERS", "0")
    assert worker_count(CPU) == 0
    assert not Engine().jobs.usable(CPU) and not Engine().jobs.pays(CPU)
    monkeypatch.delenv("BLADE_COMPILE_WORKERS")
    assert worker_count(CPU) == 1
    assert Engine().jobs.usable(CPU) and not Engine().jobs.pays(CPU)
    monkeypatch.setenv("BLADE_COMPILE_WORKERS", "many")
    with pytest.raises(InvalidChoice, match="BLADE_COMPILE_WORKERS is 'many'"):
        worker_count(CPU)


@pytest.mark.parametrize(
    ("cores", "vram", "memory", "count"),
    [
        (16, 80, 100, 14),
        (32, 80, 100, 16),
        (8, 80, 100, 6),
        (4, 80, 100, 2),
        (3, 80, 100, 1),
        (32, 24, 100, 16),
        (32, 6.5, 100, 6),
        (32, 80, 5, 5),
        (2, 2, 1, 1),
    ],
)
def test_how_many_processes_for_a_gpu(
    cores: int, vram: float, memory: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BLADE_COMPILE_WORKERS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(vram * 2**30), 80 * 2**30))
    monkeypatch.setattr(pool, "free_memory", lambda: memory * 2**30)
    assert worker_count(torch.device("cuda")) == count
    # Where somebody waits, one does not make up for its start.
    assert Engine().jobs.pays(torch.device("cuda")) == (FORKS and count >= 2)

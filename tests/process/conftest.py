"""An engine with two processes to compile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from blade_tests.unit.samples import CPU

from blade.blade_core.engine import Engine
from blade.blade_core.log import forget_said


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLADE_COMPILE_WORKERS", "2")
    forget_said()


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(budget=2**30)
    assert engine.jobs.usable(CPU)
    yield engine
    engine.jobs.close()

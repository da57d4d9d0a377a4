"""A budget of three captures, a pool in it, and a replayer for one run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from blade_tests.unit.capture.tape import MIB, Tape

from blade.blade_core import log
from blade.blade_core.capture import CaptureBudget, CapturePool, Replayer
from blade.blade_core.counters import Counters


@pytest.fixture
def tape() -> type[Tape]:
    class Own(Tape):
        made: list[Tape] = []  # noqa: RUF012
        recordings = releases = 0

        @staticmethod
        def at_release() -> None:
            pass

        @staticmethod
        def usable(device: torch.device) -> bool:
            return Own.usable_now

        @staticmethod
        def waits() -> AbstractContextManager[list[str]]:
            return collect()

    @contextmanager
    def collect() -> Iterator[list[str]]:
        found: list[str] = []
        yield found
        found.extend(Own.waiting)  # known at the end only, as with the real one

    return Own


@pytest.fixture(autouse=True)
def _unsaid() -> None:
    log.forget_said()


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
def budget(counters: Counters, tape: type[Tape]) -> CaptureBudget:
    """Three captures of what `tape` says that each takes."""
    return CaptureBudget(counters, tape, 3 * MIB)


@pytest.fixture
def pool(budget: CaptureBudget) -> CapturePool:
    return CapturePool(budget)


@pytest.fixture
def replayer(pool: CapturePool) -> Replayer:
    return Replayer(pool, strict=True)

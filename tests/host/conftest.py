"""Fixtures over the real ComfyUI in this process."""

from collections.abc import Iterator
from typing import Any

import pytest
from blade_tests.host.recorder import TapeRecorder
from blade_tests.host.tiny import SD15, SDXL, make_model

from blade.blade_core import log
from blade.blade_core.capture import CaptureBudget
from blade.blade_core.host import model as blade_model


@pytest.fixture(params=["launched", "captured"])
def session(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[blade_model.Session]:
    """A session of this test's own, so that counters and cache start empty.

    Everything holds launch by launch, and with steps captured.
    """
    fresh = blade_model.Session()
    if request.param == "captured":
        fresh.captures = CaptureBudget(fresh.engine.counters, TapeRecorder, 2**30)
    log.forget_said()
    monkeypatch.setattr(blade_model, "session", lambda: fresh)
    yield fresh


@pytest.fixture
def sd15() -> Any:
    return make_model(SD15)


@pytest.fixture
def sdxl() -> Any:
    return make_model(SDXL)

"""Importing the compiler beside the host's own work."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from blade_tests.unit.samples import CPU, request_of

from blade.blade_core.backends import BACKENDS
from blade.blade_core.config import OptimizeConfig
from blade.blade_core.engine import Engine
from blade.blade_core.preload import Preload

PATIENCE = 20.0


class Slow:
    """What of a backend is asked for here."""

    name = "slow"

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.times, self.go = error, 0, threading.Event()

    def preload(self) -> None:
        self.times += 1
        assert self.go.wait(PATIENCE)
        if self.error is not None:
            raise self.error


def started(backend: Any) -> Preload:
    preload = Preload()
    preload.start(backend)
    return preload


def test_the_caller_goes_on_and_whoever_needs_it_waits() -> None:
    slow = Slow()
    preload = started(slow)
    waiting = threading.Thread(target=preload.wait)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    slow.go.set()
    waiting.join(PATIENCE)
    assert not waiting.is_alive()


def test_once() -> None:
    slow = Slow()
    slow.go.set()
    preload = started(slow)
    again: Any = Slow()
    preload.start(again)
    preload.wait()
    assert (slow.times, again.times) == (1, 0)


def test_without_a_start_there_is_nothing_to_wait_for() -> None:
    Preload().wait()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_cannot_be_imported_is_no_error_here() -> None:
    slow = Slow(error=OSError("no such library"))
    slow.go.set()
    started(slow).wait()


def test_a_first_image_in_the_background_does_not_wait_for_an_import(tmp_path: Path) -> None:
    background = OptimizeConfig(backend="inductor", compile="background")
    engine = Engine(store=(tmp_path, 2**30))
    engine.expect(background, CPU)
    assert engine._preload._thread is None
    request = request_of()
    engine.store.write(request.key, b"a graph of an earlier life")  # type: ignore[union-attr]
    engine.expect(background, CPU)
    assert engine._preload._thread is not None
    engine._preload.wait()


@pytest.mark.parametrize("days, imports", [(None, False), (1, True), (8, False)])
def test_who_used_graphs_lately_finds_the_compiler_imported(
    tmp_path: Path, days: int | None, imports: bool
) -> None:
    engine = Engine(store=(tmp_path, 2**30))
    if days is not None:
        engine.store.write(request_of().key, b"a graph of an earlier life")  # type: ignore[union-attr]
        (file,) = tmp_path.iterdir()
        then = time.time() - days * 24 * 3600
        os.utime(file, (then, then))
    engine.started(CPU)
    assert (engine._preload._thread is not None) == imports
    engine._preload.wait()


def test_without_graphs_on_disk_a_start_imports_nothing() -> None:
    engine = Engine()
    engine.started(CPU)
    assert engine._preload._thread is None


def test_nothing_is_imported_for_who_does_not_compile() -> None:
    engine = Engine()
    engine.expect(OptimizeConfig(backend="eager"), CPU)
    assert engine._preload._thread is None
    assert engine.backends(OptimizeConfig(backend="eager"), CPU) == (BACKENDS["eager"],)

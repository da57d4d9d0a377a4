"""Graphs on disk as an engine uses them: loaded, refused, and kept where only now nothing goes."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blade_tests.unit.samples import CPU, Unit, request_of

from blade.blade_core.backends import BACKENDS, Backend
from blade.blade_core.backends.eager import EagerBackend
from blade.blade_core.engine import Engine
from blade.blade_core.errors import CompileFailed
from blade.blade_core.graph import Compiled, Graph, GraphRequest
from blade.blade_core.log import forget_said

posix = pytest.mark.skipif(sys.platform == "win32", reason="modes say nothing on Windows")


@pytest.fixture(autouse=True)
def _say_everything() -> Iterator[None]:
    forget_said()
    yield
    forget_said()


def get(engine: Engine, request: GraphRequest, backend: Backend | None = None) -> Graph:
    return engine.graph(
        request.key,
        backend or EagerBackend(),
        lambda: request,
        checkpoint=lambda: None,
        announce=lambda key: None,
    )


def same(graph: Graph, request: GraphRequest) -> bool:
    result = graph.call(request.weights, request.inputs)
    return torch.allclose(result, request.eager(request.weights, request.inputs), atol=1e-5)


@pytest.mark.parametrize("name", ["eager", "inductor"])
def test_a_second_engine_loads_and_compiles_nothing(name: str, folder: Path) -> None:
    backend = BACKENDS[name]
    if backend.available(CPU) is not None:
        pytest.skip(f"no {name} here")
    first, second = (Engine(budget=2**30, store=(folder, 2**30)) for _ in range(2))
    request = request_of()
    with first.counters.expect(graphs_compiled=1, graphs_loaded=0):
        get(first, request, backend)
    other = request_of(Unit())  # the same structure, other weights
    assert other.key == request.key
    with second.counters.expect(graphs_compiled=0, graphs_loaded=1, cache_misses=1):
        assert same(get(second, other, backend), other)
    assert second.counters.snapshot()["load_seconds"] > 0
    with second.counters.expect(graphs_loaded=0, cache_hits=1):
        get(second, other, backend)


def test_a_frozen_graph_is_not_stored(folder: Path) -> None:
    engine = Engine(budget=2**30, store=(folder, 2**30))
    get(engine, request_of(frozen=True))
    assert list(folder.iterdir()) == []


class Wrong(EagerBackend):
    """Loads what gives another result, or does not load at all."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def load(self, artifact: bytes, request: GraphRequest) -> Any:
        if self.error is not None:
            raise self.error
        return lambda weights, inputs: request.eager(weights, inputs) + 1

    def compile(self, request: GraphRequest) -> Compiled:
        return EagerBackend().compile(request)


@pytest.mark.parametrize("error", [None, ModuleNotFoundError("gone"), AssertionError()], ids=repr)
def test_what_cannot_be_used_any_more_is_compiled_again(
    error: Exception | None, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    request = request_of()
    get(Engine(budget=2**30, store=(folder, 2**30)), request)
    engine = Engine(budget=2**30, store=(folder, 2**30))
    with (
        caplog.at_level(logging.WARNING, "blade"),
        engine.counters.expect(graphs_loaded=0, artifacts_dropped=1, graphs_compiled=1),
    ):
        assert same(get(engine, request, Wrong(error)), request)
    assert len(caplog.messages) == 1
    assert engine.store is not None and engine.store.stored().graphs == 1  # the new one


def test_cancel_while_loading_drops_nothing(folder: Path) -> None:
    class InterruptProcessingException(Exception):
        pass

    request = request_of()
    get(Engine(budget=2**30, store=(folder, 2**30)), request)
    engine = Engine(budget=2**30, store=(folder, 2**30))
    with pytest.raises(InterruptProcessingException):
        get(engine, request, Wrong(InterruptProcessingException()))
    assert engine.store is not None and engine.store.stored().graphs == 1
    assert get(engine, request) is not None and engine.counters["graphs_loaded"] == 1


@posix
def test_torch_may_not_unpack_where_others_write(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = BACKENDS["inductor"]
    if backend.available(CPU) is not None:
        pytest.skip("no inductor here")
    request = request_of()
    get(Engine(budget=2**30, store=(folder, 2**30)), request, backend)
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(open_to_all))
    engine = Engine(budget=2**30, store=(folder, 2**30))
    with (
        caplog.at_level(logging.WARNING, "blade"),
        engine.counters.expect(graphs_loaded=0, artifacts_dropped=0, graphs_compiled=1),
    ):
        get(engine, request, backend)
    assert any("TORCHINDUCTOR_CACHE_DIR" in message for message in caplog.messages)
    assert backend.job(request) is None  # what another process made could not be loaded either


@posix
def test_a_folder_that_may_not_be_searched_is_no_store(folder: Path) -> None:
    """As with a server that runs as another user than HOME's."""
    request = request_of()
    get(Engine(budget=2**30, store=(folder, 2**30)), request)
    above, user = folder.parent, os.geteuid()
    above.chmod(0)
    if user == 0:  # who may search anything
        os.seteuid(65534)
    try:
        engine = Engine(budget=2**30, store=(folder, 2**30))
        assert engine.store is not None
        assert request.key not in engine.store and engine.store.read(request.key) is None
        assert list(engine.store.latest(9, 9.0)) == []
        with engine.counters.expect(graphs_compiled=1, graphs_loaded=0, artifacts_dropped=0):
            assert same(get(engine, request), request)
    finally:
        os.seteuid(user)
        above.chmod(0o700)
    second = Engine(budget=2**30, store=(folder, 2**30))
    with second.counters.expect(graphs_loaded=1):
        get(second, request)


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EACCES, errno.EMFILE], ids=errno.errorcode.get
)
def test_a_disk_that_cannot_be_used_now_costs_no_graphs(number: int, folder: Path) -> None:
    request = request_of()
    get(Engine(budget=2**30, store=(folder, 2**30)), request)
    engine = Engine(budget=2**30, store=(folder, 2**30))
    with engine.counters.expect(artifacts_dropped=0, graphs_loaded=0):
        if number == errno.ENOSPC:  # compiling would meet it, too
            with pytest.raises(CompileFailed, match="The disk filled up") as caught:
                get(engine, request, Wrong(OSError(number, "no")))
            assert caught.value.transient
        else:
            assert same(get(engine, request, Wrong(OSError(number, "no"))), request)
    second = Engine(budget=2**30, store=(folder, 2**30))
    with second.counters.expect(graphs_loaded=1):
        get(second, request)

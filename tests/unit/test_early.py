"""Graphs that are loaded before anybody asks for them."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blade_tests.unit import samples
from blade_tests.unit.samples import CPU, Unit

from blade.blade_core.backends import BACKENDS
from blade.blade_core.backends.inductor import InductorBackend
from blade.blade_core.config import OptimizeConfig
from blade.blade_core.counters import Counters
from blade.blade_core.early import EarlyGraphs
from blade.blade_core.engine import Engine
from blade.blade_core.graph import Graph, GraphRequest
from blade.blade_core.key import is_for
from blade.blade_core.log import logger
from blade.blade_core.store import GraphStore

INDUCTOR = BACKENDS["inductor"]
BACKEND_HERE = INDUCTOR.available(CPU) is None
needs_inductor = pytest.mark.skipif(not BACKEND_HERE, reason="no inductor here")


def request_of(unit: Unit | None = None) -> GraphRequest:
    """With the key that Inductor's graphs have."""
    request = samples.request_of(unit)
    return replace(request, key=replace(request.key, backend=INDUCTOR.fingerprint()))


def engine_of(folder: Path) -> Engine:
    return Engine(budget=2**30, store=(folder, 2**30))


def get(engine: Engine, request: GraphRequest) -> Graph:
    return engine.graph(
        request.key, INDUCTOR, lambda: request, checkpoint=lambda: None, announce=lambda key: None
    )


def started(engine: Engine) -> EarlyGraphs:
    assert engine.store is not None
    engine.early.start(engine.store, InductorBackend(), CPU, lambda: None)
    engine.early.wait()
    return engine.early


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the graph of `request_of()`, as an earlier process left it."""
    folder = tmp_path_factory.mktemp("graphs")
    folder.chmod(0o700)
    get(engine_of(folder), request_of())
    return folder


@needs_inductor
def test_who_asks_takes_what_is_there(
    filled: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, request = engine_of(filled), request_of(Unit())
    with caplog.at_level("INFO", logger=logger.name):
        early = started(engine)
    assert len(early) == 1
    assert "1 graphs of last time loaded in" in caplog.text
    (file,) = filled.iterdir()
    os.utime(file, (1, 1))

    def fails(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded once more")

    monkeypatch.setattr(InductorBackend, "load_for", fails)
    with engine.counters.expect(graphs_compiled=0, graphs_loaded=1, artifacts_dropped=0):
        graph = get(engine, request)
    result = graph.call(request.weights, request.inputs)
    assert torch.allclose(result, request.eager(request.weights, request.inputs), atol=1e-5)
    assert graph.nbytes < file.stat().st_size and len(early) == 0
    assert file.stat().st_mtime > 1  # it was used now


@needs_inductor
def test_what_differs_is_dropped_and_compiled(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    (file,) = filled.iterdir()
    (tmp_path / file.name).write_bytes(file.read_bytes())
    engine = engine_of(tmp_path)
    load_for = InductorBackend.load_for

    def wrong(*args: Any, **options: Any) -> Any:
        call = load_for(*args, **options)
        return lambda weights, inputs: call(weights, inputs) * 1.5

    monkeypatch.setattr(InductorBackend, "load_for", wrong)
    started(engine)
    monkeypatch.undo()
    with engine.counters.expect(graphs_compiled=1, graphs_loaded=0, artifacts_dropped=1):
        get(engine, request_of())


@needs_inductor
def test_what_was_asked_for_is_not_loaded(filled: Path) -> None:
    engine = engine_of(filled)
    get(engine, request_of())
    assert len(started(engine)) == 0


def left(folder: Path, content: bytes) -> EarlyGraphs:
    """What is loaded of a folder that holds the file of `request_of()` with such content."""
    folder.chmod(0o700)
    (folder / f"{request_of().key.id}.graph").write_bytes(content)
    early = EarlyGraphs(threading.Lock())
    early.start(GraphStore(folder, 2**30, Counters()), InductorBackend(), CPU, lambda: None)
    early.wait()
    return early


@needs_inductor
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:-1] + b"?",
        lambda content: content.replace(b'"format": ', b'"format": 9'),
        lambda content: content.replace(b"inductor ", b"inductor 0.", 1),
        lambda content: content.replace(b"torch=", b"torch=0.", 1),
        lambda content: b"[]\n" + content,
        lambda content: b"",
    ],
)
def test_what_is_damaged_or_of_others_stays_on_disk(
    filled: Path, tmp_path: Path, damage: Any
) -> None:
    (file,) = filled.iterdir()
    assert len(left(tmp_path, file.read_bytes())) == 1
    damaged = damage(file.read_bytes())
    assert damaged != file.read_bytes()
    assert len(left(tmp_path, damaged)) == 0
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@needs_inductor
def test_what_cannot_be_loaded_is_left_to_who_needs_it(filled: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    store = GraphStore(tmp_path, 2**30, Counters())
    store.write(request_of().key, b"no artifact")
    engine = engine_of(tmp_path)
    assert len(started(engine)) == 0
    with engine.counters.expect(graphs_compiled=1, artifacts_dropped=1):
        get(engine, request_of())


@needs_inductor
def test_cleared_nothing_more_is_loaded(filled: Path) -> None:
    engine, go = engine_of(filled), threading.Event()
    assert engine.store is not None

    def ready() -> None:
        assert go.wait(20)

    engine.early.start(engine.store, InductorBackend(), CPU, ready)
    engine.early.clear()
    go.set()
    engine.early.wait()
    assert len(engine.early) == 0


@needs_inductor
def test_nobody_compiles_meanwhile(filled: Path) -> None:
    engine = engine_of(filled)
    assert engine.store is not None
    with engine._compiling:
        engine.early.start(engine.store, InductorBackend(), CPU, lambda: None)
        time.sleep(0.5)
        assert len(engine.early) == 0
    engine.early.wait()
    assert len(engine.early) == 1


def test_a_folder_of_others_is_not_read(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    store = GraphStore(tmp_path / "none", 2**30, Counters())
    assert list(store.latest(9, 9.0)) == []
    open_to_all = GraphStore(tmp_path, 2**30, Counters())
    (tmp_path / "0.graph").write_bytes(b"{}\n")
    assert list(open_to_all.latest(9, 9.0)) == []


def test_the_latest_come_first(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    store = GraphStore(tmp_path, 2**30, Counters())
    keys = [request_of(Unit(channels)).key for channels in (8, 16, 24)]
    for age, key in enumerate(keys):
        store.write(key, key.id.encode())
        os.utime(tmp_path / f"{key.id}.graph", (100 - age, 100 - age))
    each = [(key.id, key.text, key.id.encode()) for key in keys]
    assert list(store.latest(2, 9.0)) == each[:2]
    assert list(store.latest(9, 1.0)) == each[:2]
    assert list(store.latest(9, 2.0)) == each


def test_whose_a_key_is() -> None:
    key = request_of().key
    assert not is_for(key.text, key.backend + "0", CPU)
    assert is_for(key.text, key.backend, CPU)
    assert not is_for(key.text.replace("format=", "format=9"), key.backend, CPU)


@needs_inductor
def test_graphs_with_other_kernels_are_left(filled: Path) -> None:
    engine = engine_of(filled)
    assert engine.store is not None
    engine.early.start(engine.store, InductorBackend(()), CPU, lambda: None)
    engine.early.wait()
    assert not len(engine.early)


def test_a_server_loads_those_that_its_nodes_will_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only for a GPU: there is none here, so that what is asked for is looked at."""
    engine, asked = engine_of(tmp_path), []
    monkeypatch.setattr(GraphStore, "used_within", lambda store, seconds: True)
    monkeypatch.setattr(engine._preload, "start", lambda backend: None)  # imports it in a thread
    monkeypatch.setattr(engine.early, "start", lambda *given: asked.append(given[1]))
    monkeypatch.setenv("BLADE_KERNELS", "geglu")
    engine.started(torch.device("cuda"))
    assert asked == list(engine.backends(OptimizeConfig(backend="inductor"), CPU))

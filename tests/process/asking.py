"""Asking an engine for graphs that other processes compile."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

import torch
from blade_tests.unit.samples import inputs_of, request_of

from blade.blade_core.backends import BACKENDS, Backend
from blade.blade_core.engine import Engine
from blade.blade_core.graph import Graph, GraphRequest

PATIENCE = 120.0
EAGER = BACKENDS["eager"]


def nothing(*_: object) -> None:
    pass


def soon(
    engine: Engine, request: GraphRequest, backend: Backend = EAGER, *, least: int = 1
) -> Graph | None:
    return engine.soon(
        request.key,
        backend,
        lambda: request,
        least=least,
        checkpoint=nothing,
        announce=nothing,
        beside=nothing,
    )


def now(
    engine: Engine,
    request: GraphRequest,
    backend: Backend = EAGER,
    checkpoint: Callable[[], None] = nothing,
) -> Graph:
    return engine.graph(
        request.key, backend, lambda: request, checkpoint=checkpoint, announce=nothing
    )


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def requests(count: int) -> list[GraphRequest]:
    return [request_of(inputs=inputs_of((2, 4, 8, 8 * (n + 1)))) for n in range(count)]


def same(graph: Graph, request: GraphRequest) -> bool:
    result = graph.call(request.weights, request.inputs)
    return torch.allclose(result, request.eager(request.weights, request.inputs), atol=1e-5)


def the_process(engine: Engine) -> subprocess.Popen[bytes]:
    """The one that runs, once it does."""
    workers = engine.jobs._workers
    assert workers is not None
    until(lambda: len(workers.processes()) == 1)
    return workers.processes()[0]

"""torch_blade's graphs, run, stored and in the engine, against a stand-in that has its traps."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from blade_tests.unit.torch_blade.units import (
    CPU,
    Install,
    Plain,
    Unit,
    assert_equal_to_eager,
    failing,
    forget,
    request_of,
    weights_of,
)

from blade.blade_core.backends.torch_blade import TorchBladeBackend
from blade.blade_core.config import OptimizeConfig
from blade.blade_core.engine import Engine
from blade.blade_core.errors import BackendUnavailable, CompileFailed, is_out_of_memory
from blade.blade_core.graph import GraphRequest

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


# --- running ----------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["weights", "frozen"])
def test_errors_of_a_call_reach_the_caller(package: ModuleType, frozen: bool) -> None:
    request = request_of(frozen=frozen)
    call = TorchBladeBackend().compile(request).call
    package.switches.during_run = failing("Device changed during inference")
    with pytest.raises(RuntimeError) as caught:
        call(request.weights, request.inputs)
    assert str(caught.value) == "Device changed during inference"
    assert not is_out_of_memory(caught.value)
    package.switches.during_run = failing("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(RuntimeError) as caught:
        call(request.weights, request.inputs)
    assert str(caught.value) == "CUDA out of memory. Tried to allocate 2.00 GiB"
    assert is_out_of_memory(caught.value)
    package.switches.during_run = None
    assert_equal_to_eager(call, request)


# --- artifacts --------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["weights", "frozen"])
def test_load(package: ModuleType, frozen: bool) -> None:
    backend = TorchBladeBackend()
    request = request_of(frozen=frozen)
    other = weights_of(Unit())
    compiled = backend.compile(request)
    assert compiled.artifact is not None
    call = backend.load(compiled.artifact, request)
    assert_equal_to_eager(call, request)
    if frozen:
        expected = request.eager(request.weights, request.inputs)
        torch.testing.assert_close(call(other, request.inputs), expected)
    else:
        assert_equal_to_eager(call, request, other)
        assert_equal_to_eager(call, request)


def test_load_imports_the_package(package: ModuleType) -> None:
    """In a new process nobody has: TorchScript does not know what an engine is."""
    backend = TorchBladeBackend()
    request = request_of()
    path = Path(package.__file__ or "").with_name("artifact.pt")
    artifact = backend.compile(request).artifact
    assert artifact is not None
    path.write_bytes(artifact)
    forget()
    with pytest.raises(RuntimeError, match="Unknown builtin op: torch_blade::engine"):
        torch.jit.load(path)
    assert_equal_to_eager(TorchBladeBackend().load(artifact, request), request)


def test_load_of_another_units_artifact(package: ModuleType) -> None:
    backend = TorchBladeBackend()
    artifact = backend.compile(request_of(Plain(), (torch.randn(2, 4),))).artifact
    assert artifact is not None
    with pytest.raises(CompileFailed, match=r"^torch_blade changed the weights' names of Unit: "):
        backend.load(artifact, request_of())


def test_artifact_has_weights_only_if_frozen(package: ModuleType) -> None:
    backend = TorchBladeBackend()
    unit = Unit()
    compiled = backend.compile(request_of(unit))
    frozen = backend.compile(request_of(unit, frozen=True))
    assert compiled.artifact is not None and frozen.artifact is not None
    for weight in (unit.first.weight, unit.emb.weight):
        stored = weight.detach().numpy().tobytes()
        assert stored not in compiled.artifact
        assert stored in frozen.artifact
    assert compiled.nbytes == len(compiled.artifact)
    assert frozen.nbytes == len(frozen.artifact) + sum(w.nbytes for w in weights_of(unit))


# --- in the engine ----------------------------------------------------------------------------


def graph(engine: Engine, request: GraphRequest) -> Any:
    return engine.graph(
        request.key,
        TorchBladeBackend(),
        lambda: request,
        checkpoint=lambda: None,
        announce=lambda _: None,
    )


def test_units_of_one_structure_share_a_graph(package: ModuleType) -> None:
    engine = Engine(budget=2**30)
    first, second = request_of(Unit()), request_of(Unit())
    with engine.counters.expect(graphs_compiled=1, cache_misses=1, cache_hits=1):
        graphs = [graph(engine, first), graph(engine, second)]
    assert graphs[0] is graphs[1]
    assert len(package.switches.optimized_with) == 1
    for request in (first, second, first):
        assert_equal_to_eager(graphs[0].call, request)


def test_failure_is_remembered(package: ModuleType) -> None:
    engine = Engine(budget=2**30)
    package.switches.compile_error = RuntimeError("disc_compiler_main returned 1")
    request = request_of()
    with engine.counters.expect(graphs_compiled=0, compile_failures=1):
        for _ in range(2):
            with pytest.raises(CompileFailed, match="built no engine for Unit"):
                graph(engine, request)
    assert len(package.switches.optimized_with) == 1


def test_wrong_result_is_refused(package: ModuleType) -> None:
    package.switches.during_run = lambda x: x * 1.01
    engine = Engine(budget=2**30)
    with (
        engine.counters.expect(graphs_compiled=0, compile_failures=1),
        pytest.raises(
            CompileFailed, match="torch_blade built for Unit differs from the uncompiled"
        ),
    ):
        graph(engine, request_of())


def test_engine_that_fails_at_once_is_refused(package: ModuleType) -> None:
    package.switches.during_run = failing("Fallback haven't been implemented")
    with pytest.raises(CompileFailed) as caught:
        graph(Engine(budget=2**30), request_of())
    assert str(caught.value) == (
        "torch_blade could not compile Unit: RuntimeError: Fallback haven't been implemented"
    )


def test_auto_takes_it_where_it_can_run(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    engine = Engine(budget=2**30)
    assert engine.backends(OptimizeConfig(), CPU)[0].name == "torch_blade"
    forget()
    monkeypatch.setitem(sys.modules, "torch_blade", None)
    chosen = OptimizeConfig(backend="torch_blade", on_failure="error")
    with pytest.raises(BackendUnavailable) as caught:
        engine.backends(chosen, CPU)
    assert str(caught.value) == (
        'Blade cannot use backend "torch_blade" here. torch_blade: torch_blade is not installed.'
    )

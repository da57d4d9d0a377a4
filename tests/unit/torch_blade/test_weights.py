"""torch_blade's graphs and weights, against a stand-in that has the real package's traps."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch
from blade_tests.unit.torch_blade.units import (
    Unit,
    assert_equal_to_eager,
    failing,
    request_of,
    weights_of,
)
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from blade.blade_core.backends.torch_blade import TorchBladeBackend

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def test_each_call_uses_its_own_weights(package: ModuleType) -> None:
    request = request_of()
    call = TorchBladeBackend().compile(request).call
    other = weights_of(Unit())
    assert not torch.equal(call(request.weights, request.inputs), call(other, request.inputs))
    for weights in (request.weights, other, request.weights, other):
        assert_equal_to_eager(call, request, weights)


def test_changed_weights_are_seen(package: ModuleType) -> None:
    unit = Unit()
    request = request_of(unit)
    call = TorchBladeBackend().compile(request).call

    def result() -> torch.Tensor:
        assert_equal_to_eager(call, request, weights_of(unit))
        return call(weights_of(unit), request.inputs)

    seen = [result()]
    with torch.no_grad():
        unit.first.weight.mul_(1.5)  # an edit in place
        seen.append(result())
        unit.first.weight = nn.Parameter(unit.first.weight * 2)  # as a LoRA does it
        seen.append(result())
        unit.first.weight.data = unit.first.weight.data.clone().mul_(3)  # as `Module.to` does it
        seen.append(result())
        unit.emb.weight.mul_(2)  # of two names
        seen.append(result())
        unit.get_buffer("shift").add_(1)
        seen.append(result())
        unit.get_buffer("gain").add_(1)  # not persistent
        seen.append(result())
    for before, after in itertools.pairwise(seen):
        assert not torch.allclose(before, after)


def test_caller_keeps_its_weights(package: ModuleType) -> None:
    request = request_of()
    before = [w.clone() for w in request.weights]
    places = [w.data_ptr() for w in request.weights]
    call = TorchBladeBackend().compile(request).call
    call(request.weights, request.inputs)
    assert [w.data_ptr() for w in request.weights] == places
    for weight, value in zip(request.weights, before, strict=True):
        assert torch.equal(weight, value)


@pytest.mark.parametrize("fails", [False, True])
def test_graph_holds_no_weights(package: ModuleType, fails: bool) -> None:
    request = request_of()
    call = TorchBladeBackend().compile(request).call
    other = weights_of(Unit())
    storages = [StorageWeakRef(w.untyped_storage()) for w in other]
    if fails:
        package.switches.during_run = failing("Input tensor 0 device mismatch")
        with pytest.raises(RuntimeError, match="device mismatch"):
            call(other, request.inputs)
    else:
        call(other, request.inputs)
    assert not any(s.expired() for s in storages)
    del other
    assert all(s.expired() for s in storages)


@pytest.mark.parametrize("frozen", [False, True], ids=["weights", "frozen"])
def test_graph_holds_no_weights_of_its_request(package: ModuleType, frozen: bool) -> None:
    request = request_of(frozen=frozen)
    storages = [StorageWeakRef(t.untyped_storage()) for t in (*request.weights, *request.inputs)]
    compiled = TorchBladeBackend().compile(request)
    call = TorchBladeBackend().load(compiled.artifact or b"", request)
    assert not any(s.expired() for s in storages)
    del request
    assert all(s.expired() for s in storages)
    assert compiled.call is not call


def test_two_threads_run_one_graph(package: ModuleType) -> None:
    """Each with its own weights, switched to the other in the middle of a run."""
    request = request_of()
    call = TorchBladeBackend().compile(request).call
    sets = [request.weights, weights_of(Unit())]
    expected = [request.eager(weights, request.inputs) for weights in sets]
    start = threading.Barrier(2)

    def pause(x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return x

    def run(index: int) -> list[torch.Tensor]:
        start.wait()
        return [call(sets[index], request.inputs) for _ in range(5)]

    package.switches.during_run = pause
    with ThreadPoolExecutor(2) as pool:
        for index, results in enumerate(pool.map(run, range(2))):
            for result in results:
                torch.testing.assert_close(result, expected[index])


def test_frozen_weights_are_constant(package: ModuleType) -> None:
    request = request_of(frozen=True)
    expected = request.eager(request.weights, request.inputs)
    call = TorchBladeBackend().compile(request).call
    for weight in request.weights:
        weight.zero_()
    torch.testing.assert_close(call(request.weights, request.inputs), expected)
    torch.testing.assert_close(call((), request.inputs), expected)

"""Compiling with torch_blade, against a stand-in that has the real package's traps."""

from __future__ import annotations

import itertools
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import ModuleType

import pytest
import torch
from blade_tests.unit.torch_blade.units import (
    VERSION,
    Install,
    Mode,
    Plain,
    Single,
    Unit,
    assert_equal_to_eager,
    inputs,
    names_of,
    problem,
    request_of,
    weights_of,
)
from torch import nn

from blade.blade_core.backends.torch_blade import TorchBladeBackend
from blade.blade_core.graph import skeleton

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


@pytest.mark.parametrize("frozen", [False, True], ids=["weights", "frozen"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_equals_eager(package: ModuleType, frozen: bool, channels_last: bool) -> None:
    unit, (x, emb) = Unit(), inputs()
    if channels_last:
        for conv in (unit.first, unit.last):
            conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    request = request_of(unit, (x, emb, 0.5), frozen=frozen, channels_last=channels_last)
    compiled = TorchBladeBackend().compile(request)
    assert_equal_to_eager(compiled.call, request)
    result = compiled.call(request.weights, request.inputs)
    assert result.is_contiguous(memory_format=torch.channels_last) == channels_last
    x.requires_grad_()
    assert not compiled.call(request.weights, request.inputs).requires_grad


@pytest.mark.parametrize("frozen", [False, True], ids=["weights", "frozen"])
@pytest.mark.parametrize("made", [torch.inference_mode, nullcontext])
@pytest.mark.parametrize("compiled", [torch.inference_mode, nullcontext])
@pytest.mark.parametrize("called", [torch.inference_mode, nullcontext])
def test_equals_eager_in_all_modes(
    package: ModuleType, frozen: bool, made: Mode, compiled: Mode, called: Mode
) -> None:
    backend = TorchBladeBackend()
    with made():
        request = request_of(frozen=frozen)
        weights = [request.weights, request.weights if frozen else weights_of(Unit())]
    with compiled():
        result = backend.compile(request)
        assert result.artifact is not None
        calls = [result.call, backend.load(result.artifact, request)]
    with called():
        for call, used in itertools.product(calls, weights):
            for _ in range(3):  # TorchScript makes its own plan in the second call
                assert_equal_to_eager(call, request, used)


def test_what_the_package_is_given(package: ModuleType) -> None:
    request = request_of()
    request.module.train()  # a wrapper is, unless someone says otherwise
    TorchBladeBackend().compile(request)
    TorchBladeBackend().compile(request_of(frozen=True))
    half = Plain().half()
    TorchBladeBackend().compile(request_of(half, (torch.randn(2, 4).half(),)))
    seen = package.switches.optimized_with
    assert [s["freeze_module"] for s in seen] == [False, True, False]
    assert [s["enable_fp16"] for s in seen] == [False, False, True]
    for options in seen:
        assert options["training"] is False
        assert options["tracing"] is True
        assert options["pipeline"] == "DISC"
        assert options["inputs"] is tuple
    assert not package.Config._stack()


@pytest.mark.parametrize("name", ["bfloat16", "float64", "float8_e4m3fn"])
@pytest.mark.parametrize("of", ["weights", "inputs"])
def test_dtypes_that_it_cannot_compile(package: ModuleType, name: str, of: str) -> None:
    dtype = getattr(torch, name)
    module, x = Plain(), torch.randn(2, 4)
    if of == "weights":
        linear = module.unit[0]
        assert isinstance(linear, nn.Linear)
        linear.weight = nn.Parameter(linear.weight.to(dtype), requires_grad=False)
    else:
        x = x.to(dtype)
    expected = (
        f"torch_blade compiles float32 and float16, but Unit has {name}. Choose backend inductor."
    )
    assert str(problem(request_of(module, (x,)))) == expected
    assert not package.switches.optimized_with


def test_weights_on_another_device(package: ModuleType) -> None:
    request = request_of()
    elsewhere = (request.weights[0].to("meta"), *request.weights[1:])
    object.__setattr__(request, "weights", elsewhere)
    assert str(problem(request)) == (
        "torch_blade wants all tensors on one device, but Unit has some on meta and some on cpu. "
        "Choose backend inductor."
    )


def test_trace_fails(package: ModuleType) -> None:
    package.switches.trace_error = RuntimeError("value in the trace\nmore about it")
    error = problem(request_of())
    assert str(error) == (
        "torch_blade could not trace Unit, and gave back plain Python (value in the trace). "
        "Choose backend inductor."
    )
    assert not error.transient
    assert not logging.getLogger("torch_blade").handlers


def test_trace_fails_and_scripting_works(package: ModuleType) -> None:
    module = Plain()
    request = request_of(module, (torch.randn(2, 4),))
    object.__setattr__(request, "module", skeleton(module))
    object.__setattr__(request, "names", tuple(names_of(module)))
    package.switches.trace_error = RuntimeError("value in the trace")
    assert str(problem(request)) == (
        "torch_blade could not trace Unit, and scripted it instead, which may compute another "
        "thing (value in the trace). Choose backend inductor."
    )


def test_compiler_fails(package: ModuleType) -> None:
    package.switches.compile_error = RuntimeError("disc_compiler_main returned 1")
    error = problem(request_of())
    assert str(error) == (
        "torch_blade built no engine for Unit, so that it would be no faster "
        "(disc_compiler_main returned 1). Choose backend inductor."
    )
    assert not error.transient


def test_nothing_to_compile(package: ModuleType) -> None:
    assert str(problem(request_of(Single(), (torch.randn(2, 4),)))) == (
        "torch_blade built no engine for Unit, so that it would be no faster. "
        "Choose backend inductor."
    )


@pytest.mark.parametrize("switch", ["trace_error", "compile_error"])
@pytest.mark.parametrize("words", ["CUDA out of memory. Tried", "[Errno 28] No space left on"])
def test_swallowed_lack_of_memory_is_tried_again(
    package: ModuleType, switch: str, words: str
) -> None:
    setattr(package.switches, switch, RuntimeError(words))
    assert problem(request_of()).transient


def test_freezing_is_skipped(package: ModuleType) -> None:
    package.switches.skip_freezing = True
    assert str(problem(request_of(frozen=True))) == (
        "torch_blade did not fold all weights of Unit. Choose backend inductor."
    )


def test_weights_change_their_names(package: ModuleType) -> None:
    package.switches.rename = True
    message = str(problem(request_of(Plain(), (torch.randn(2, 4),))))
    assert message.startswith("torch_blade changed the weights' names of Unit: inner.unit.unit.0.")
    assert "unit.unit.2.weight. Choose backend inductor." in message


def test_weight_without_a_value(package: ModuleType) -> None:
    request = request_of()
    object.__setattr__(request, "names", request.names[:-1])
    object.__setattr__(request, "weights", request.weights[:-1])
    assert str(problem(request)) == "unit.gain of Unit is not among its weights."


def test_unknown_option(install: Install) -> None:
    install(build="options = []")
    assert str(problem(request_of())) == (
        f"torch_blade {VERSION} has no option enable_fp16. Choose backend inductor."
    )


def test_two_threads_compile(package: ModuleType) -> None:
    package.switches.during_optimize = lambda: time.sleep(0.05)
    requests = [request_of(), request_of(frozen=True)]
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(TorchBladeBackend().compile, requests))
    for one, request in zip(compiled, requests, strict=True):
        assert_equal_to_eager(one.call, request)

"""What each compiler has to do. `torch_blade` has tests of its own: it needs a stand-in."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import pytest
import torch
from blade_tests.unit.samples import CPU, SHAPE, Unit, inputs_of, request_of
from torch.multiprocessing.reductions import StorageWeakRef

from blade.blade_core.backends import BACKENDS, Backend
from blade.blade_core.graph import Compiled, GraphRequest
from blade.blade_core.log import forget_said

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

OTHER_SHAPE = (1, 4, 4, 6)
Tensors = tuple[torch.Tensor, ...]
Get = Callable[..., tuple[GraphRequest, Compiled]]


@pytest.fixture(scope="module", params=["eager", "inductor"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]


@pytest.fixture(scope="module")
def compiled(backend: Backend) -> Get:
    """Compile the unit for a shape and dtype, once for all tests, in inference mode as the host."""

    @cache
    def get(
        shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32, frozen: bool = False
    ) -> tuple[GraphRequest, Compiled]:
        torch.manual_seed(0)
        request = request_of(Unit().to(dtype), inputs_of(shape, dtype), frozen=frozen)
        with torch.inference_mode():
            return request, backend.compile(request)

    return get


def copies(tensors: Tensors) -> Tensors:
    return tuple(tensor.clone(memory_format=torch.preserve_format) for tensor in tensors)


def assert_equal(actual: torch.Tensor, request: GraphRequest, weights: Tensors) -> None:
    """To the eager module, in the strides that were traced; compilers round less often."""
    expected = request.eager(weights, request.inputs)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.stride() == expected.stride()
    error = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert error <= (2e-2 if expected.dtype == torch.bfloat16 else 1e-5)


# --- results ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(SHAPE, torch.float32), (OTHER_SHAPE, torch.float32), (SHAPE, torch.bfloat16)],
    ids=["fp32", "another shape", "bf16"],
)
def test_result_is_the_eager_module_s(
    shape: tuple[int, ...], dtype: torch.dtype, compiled: Get
) -> None:
    request, graph = compiled(shape, dtype)
    assert_equal(graph.call(request.weights, request.inputs), request, request.weights)


def test_result_goes_with_the_inputs(compiled: Get) -> None:
    request, graph = compiled()
    other = inputs_of()
    expected = request.eager(request.weights, other)
    assert not torch.allclose(request.eager(request.weights, request.inputs), expected)
    torch.testing.assert_close(graph.call(request.weights, other), expected)


def test_weights_are_those_of_the_call(compiled: Get) -> None:
    request, graph = compiled()
    before = graph.call(request.weights, request.inputs)
    weights = tuple(w * 1.5 for w in request.weights)
    assert_equal(graph.call(weights, request.inputs), request, weights)
    for weight in weights:  # edited where they are, as a LoRA does
        weight.mul_(2)
    assert_equal(graph.call(weights, request.inputs), request, weights)
    torch.testing.assert_close(graph.call(request.weights, request.inputs), before)


def test_arguments_are_not_written_to(compiled: Get) -> None:
    request, graph = compiled()
    arguments = (*request.weights, *request.inputs)
    before = copies(arguments)
    first = graph.call(request.weights, request.inputs)
    kept = first.clone()
    graph.call(copies(request.weights), inputs_of())
    assert all(map(torch.equal, arguments, before))
    assert torch.equal(first, kept)  # nor is a result that was given away


def test_a_graph_holds_no_weight_and_no_input(compiled: Get) -> None:
    """Or an unloaded model would stay in memory."""
    request, graph = compiled()
    weights, inputs = copies(request.weights), copies(request.inputs)
    storages = [StorageWeakRef(t.untyped_storage()) for t in (*weights, *inputs)]
    graph.call(weights, inputs)
    del weights, inputs
    gc.collect()
    assert [storage.expired() for storage in storages] == [True] * 9


def test_compiling_holds_no_weight_and_no_input(backend: Backend) -> None:
    request = request_of()
    storages = [StorageWeakRef(t.untyped_storage()) for t in (*request.weights, *request.inputs)]
    graph = backend.compile(request)
    del request
    gc.collect()
    assert [storage.expired() for storage in storages] == [True] * 9
    assert graph.nbytes > 0


# --- where it is called -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_runs_in_every_mode(
    mode: Callable[[], AbstractContextManager[None]], compiled: Get
) -> None:
    request, graph = compiled()
    with mode():
        actual = graph.call(request.weights, request.inputs)
    assert_equal(actual, request, request.weights)
    assert not actual.requires_grad


def test_it_takes_tensors_made_in_inference_mode(compiled: Get) -> None:
    request, graph = compiled()
    with torch.inference_mode():
        weights, inputs = copies(request.weights), copies(request.inputs)
        actual = graph.call(weights, inputs)
    assert_equal(actual.clone(), request, request.weights)


def test_it_runs_in_other_threads(compiled: Get) -> None:
    request, graph = compiled()
    other = tuple(w * 2 for w in request.weights)
    with ThreadPoolExecutor(4) as pool:
        sets = [request.weights, other] * 8
        results = list(pool.map(lambda weights: graph.call(weights, request.inputs), sets))
    for weights, result in zip(sets, results, strict=True):
        assert_equal(result, request, weights)


# --- frozen -------------------------------------------------------------------------------------


def test_frozen_uses_its_own_weights(compiled: Get) -> None:
    request, graph = compiled(frozen=True)
    assert_equal(graph.call((), request.inputs), request, request.weights)
    other = tuple(w * 2 for w in request.weights)
    assert_equal(graph.call(other, request.inputs), request, request.weights)


def test_frozen_counts_the_weights_that_it_holds(compiled: Get) -> None:
    request, graph = compiled(frozen=True)
    _, without = compiled()
    assert graph.nbytes >= without.nbytes + sum(weight.nbytes for weight in request.weights)


def test_frozen_weights_do_not_follow_the_live_ones(compiled: Get) -> None:
    """Another model with equal weights takes the same graph; a LoRA edits the first one's."""
    request, graph = compiled(frozen=True)
    before = copies(request.weights)
    try:
        for weight in request.weights:
            weight.mul_(2)
        assert_equal(graph.call((), request.inputs), request, before)
    finally:
        for weight, old in zip(request.weights, before, strict=True):
            weight.copy_(old)


# --- to store, and to tell apart ----------------------------------------------------------------


def test_a_stored_graph_gives_the_same_result(backend: Backend, compiled: Get) -> None:
    request, graph = compiled()
    assert graph.artifact is not None
    assert graph.nbytes >= len(graph.artifact)
    call = backend.load(graph.artifact, request)
    weights = tuple(w * 3 for w in request.weights)
    expected = graph.call(weights, request.inputs)
    assert torch.equal(call(weights, request.inputs), expected)
    assert call(weights, request.inputs).stride() == expected.stride()


def test_a_stored_graph_does_not_hold_the_weights(compiled: Get) -> None:
    request, graph = compiled()
    assert graph.artifact is not None
    held = [w.numpy().tobytes() in graph.artifact for w in request.weights if w.numel() > 100]
    assert held == [False]


def test_fingerprint_names_the_backend(backend: Backend) -> None:
    assert backend.fingerprint().split(" ")[0] == backend.name
    assert backend.fingerprint() == backend.fingerprint()


def test_it_can_run_on_the_cpu(backend: Backend) -> None:
    assert backend.available(CPU) is None


# --- Inductor's own -----------------------------------------------------------------------------


def test_inductor_counts_its_version_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    from blade.blade_core.backends import standalone

    fingerprint = BACKENDS["inductor"].fingerprint()
    assert torch.__version__ in fingerprint
    for option, value in standalone.OPTIONS.items():
        with monkeypatch.context() as changed:
            changed.setitem(standalone.OPTIONS, option, not value)
            assert BACKENDS["inductor"].fingerprint() != fingerprint


@pytest.mark.parametrize("torch_before_2_8", [True, False])
def test_inductor_s_graph_is_used_even_if_it_cannot_be_stored(
    torch_before_2_8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise RuntimeError("not serializable")

    def compile_unstorable(*args: Any, **options: Any) -> Any:
        result = standalone_compile(*args, **options)
        monkeypatch.setattr(result, "save", refuse)
        return result

    standalone_compile = torch._inductor.standalone_compile
    if torch_before_2_8:
        monkeypatch.delattr(torch._inductor, "standalone_compile")
    else:
        monkeypatch.setattr(torch._inductor, "standalone_compile", compile_unstorable)
    request = request_of()
    graph = BACKENDS["inductor"].compile(request)
    assert graph.artifact is None and graph.nbytes > 0
    weights = tuple(w * 2 for w in request.weights)
    assert_equal(graph.call(weights, request.inputs), request, weights)


def test_inductor_says_that_an_older_torch_keeps_no_graphs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forget_said()
    BACKENDS["inductor"].available(torch.device("cpu"))
    assert "cannot keep compiled graphs" not in caplog.text
    monkeypatch.delattr(torch._inductor, "standalone_compile")
    BACKENDS["inductor"].available(torch.device("cpu"))
    assert f"torch {torch.__version__} cannot keep compiled graphs (2.8" in caplog.text


def test_inductor_says_which_devices_were_never_tried() -> None:
    reason = BACKENDS["inductor"].available(torch.device("meta"))
    assert reason == "Blade has not been tried on 'meta' devices"

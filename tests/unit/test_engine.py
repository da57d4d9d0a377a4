"""The engine: which compiler is used, and what becomes of what it gives back or raises."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from blade_tests.unit.fake_backend import Fake, Spoil
from blade_tests.unit.samples import Unit, inputs_of, request_of

from blade.blade_core.engine import Engine
from blade.blade_core.errors import CompileFailed, is_out_of_memory
from blade.blade_core.graph import Graph, GraphRequest
from blade.blade_core.log import forget_said

PATIENCE = 20.0


class InterruptProcessingException(Exception):
    """The host's cancel before 0.20."""


class NewerInterrupt(BaseException):
    """The host's cancel from 0.20 on."""


NewerInterrupt.__name__ = "InterruptProcessingException"


@pytest.fixture
def engine() -> Iterator[Engine]:
    forget_said()
    yield Engine(budget=1000)
    forget_said()


def get(engine: Engine, backend: Fake, request: GraphRequest | None = None) -> Graph:
    request = request_of() if request is None else request
    return engine.graph(
        request.key,
        backend,
        lambda: request,
        checkpoint=lambda: None,
        announce=lambda key: None,
    )


def failure(engine: Engine, backend: Fake, request: GraphRequest | None = None) -> CompileFailed:
    with pytest.raises(CompileFailed) as caught:
        get(engine, backend, request)
    return caught.value


# --- a good graph -------------------------------------------------------------------------------


def test_a_graph_is_compiled_once(engine: Engine) -> None:
    request, backend = request_of(), Fake()
    with engine.counters.expect(
        graphs_compiled=1, cache_misses=1, cache_hits=1, compile_failures=0
    ):
        graph = get(engine, backend, request)
        assert get(engine, backend, request) is graph
    assert backend.compiles == 1
    assert (graph.key, graph.nbytes, engine.cache.nbytes) == (request.key, 7, 7)
    assert graph.seconds > 0
    assert engine.counters.snapshot()["compile_seconds"] == round(graph.seconds, 3)
    expected = request.eager(request.weights, request.inputs)
    torch.testing.assert_close(graph.call(request.weights, request.inputs), expected)


def test_checkpoint_and_announcement_come_before_the_compiler(engine: Engine) -> None:
    request, backend, order = request_of(), Fake(), []

    def make() -> GraphRequest:
        order.append(("request", backend.compiles))
        return request

    for _ in range(2):
        engine.graph(
            request.key,
            backend,
            make,
            checkpoint=lambda: order.append(("checkpoint", backend.compiles)),
            announce=lambda key: order.append((key.label, backend.compiles)),
        )
    assert order == [("checkpoint", 0), ("Unit 4→8", 0), ("request", 0)]


def test_who_waits_for_another_compile_can_be_cancelled(engine: Engine) -> None:
    compiling, finish = threading.Event(), threading.Event()

    def spoil(result: torch.Tensor) -> torch.Tensor:
        compiling.set()
        assert finish.wait(PATIENCE)
        return result

    other = request_of(Unit(), inputs_of((1, 4, 8, 8)))

    def cancel() -> None:
        raise InterruptProcessingException

    def get_cancelled() -> Graph:
        return engine.graph(
            other.key, Fake(), lambda: other, checkpoint=cancel, announce=lambda key: None
        )

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(get, engine, Fake(spoil=spoil))
        assert compiling.wait(PATIENCE)
        try:
            with pytest.raises(InterruptProcessingException):
                pool.submit(get_cancelled).result(timeout=2)
            assert not first.done()
        finally:
            finish.set()
        first.result(PATIENCE)


# --- a wrong graph ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "difference"),
    [
        (lambda result: result * 1.5, "5.0e-01"),
        (lambda result: result[:1], "inf"),
        (lambda result: result * float("nan"), "nan"),
    ],
    ids=["scaled", "shape", "nan"],
)
def test_a_wrong_result_is_refused(spoil: Spoil, difference: str, engine: Engine) -> None:
    backend = Fake(spoil=spoil)
    with engine.counters.expect(graphs_compiled=0, compile_failures=1):
        error = failure(engine, backend)
    assert str(error) == (
        f"The graph that fake built for Unit 4→8 differs from the uncompiled layer by "
        f"{difference} (relative RMS), expected at most 1e-04; it is not used."
    )
    assert not error.transient
    assert len(engine.cache) == 0


@pytest.mark.parametrize(
    ("dtype", "good", "bad"),
    [
        (torch.float32, 1e-5, 1e-3),
        (torch.float16, 3e-3, 5e-2),
        (torch.bfloat16, 2e-2, 2e-1),
        (torch.float64, 0.0, 1e-5),
    ],
)
def test_tolerance_goes_with_the_dtype(
    dtype: torch.dtype, good: float, bad: float, engine: Engine
) -> None:
    request = request_of(Unit().to(dtype), inputs_of(dtype=dtype))
    failure(engine, Fake(spoil=lambda result: (result.double() * (1 + bad)).to(dtype)), request)
    engine.cache.clear()
    get(engine, Fake(spoil=lambda result: (result.double() * (1 + good)).to(dtype)), request)


def test_the_tolerance_that_is_told_is_the_one_that_counts(engine: Engine) -> None:
    request = request_of(Doubled(), (torch.arange(0, 4000, 1000),))
    get(engine, Fake(spoil=lambda result: (result * 1.001).long()), request)
    engine.cache.clear()
    error = failure(engine, Fake(spoil=lambda result: (result * 1.5).long()), request)
    assert "by 5.0e-01 (relative RMS), expected at most 1e-02;" in str(error)


def test_a_graph_of_another_dtype_is_refused(engine: Engine) -> None:
    error = failure(engine, Fake(spoil=lambda result: result.double()), request_of())
    assert "differs from the uncompiled layer by inf" in str(error)


def test_without_a_finite_reference_the_graph_is_used(engine: Engine) -> None:
    inputs = inputs_of()
    inputs[0][0, 0, 0, 0] = float("inf")
    get(engine, Fake(spoil=lambda result: result * 1.5), request_of(inputs=inputs))


class Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        return x * 2


# --- a compiler that raises ---------------------------------------------------------------------


def caused_by(error: Exception) -> Exception:
    """As a compiler wraps what went wrong."""
    outer = RuntimeError("LoweringException")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        caused_by(torch.OutOfMemoryError("CUDA out of memory")),
    ],
    ids=["device", "host", "nested"],
)
def test_out_of_memory_is_tried_again(error: Exception, engine: Engine) -> None:
    problem = failure(engine, Fake(error=error))
    assert problem.transient
    assert str(problem) == (
        "Out of memory while fake compiled Unit 4→8. Free VRAM (smaller batch or size, fewer "
        "models) or choose backend eager; Blade tries again in the next run."
    )
    with engine.counters.expect(graphs_compiled=1):
        get(engine, Fake())


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (FULL, "OSError: [Errno 28] No space left on device"),
        (caused_by(FULL), "RuntimeError: LoweringException"),
        (OSError(errno.EDQUOT, "Quota exceeded"), "OSError: [Errno 122] Quota exceeded"),
        (
            RuntimeError("C++ compile error\n\nfatal: a.o: No space left on device"),
            "RuntimeError: C++ compile error",
        ),
    ],
    ids=["disk", "nested", "quota", "compiler"],
)
def test_full_disk_is_tried_again(error: Exception, seen: str, engine: Engine) -> None:
    problem = failure(engine, Fake(error=error))
    assert problem.transient
    assert str(problem) == (
        f"The disk filled up while fake compiled Unit 4→8 ({seen}). Free space in the temporary "
        "folder or set TORCHINDUCTOR_CACHE_DIR to another disk; Blade tries again in the next run."
    )
    with engine.counters.expect(graphs_compiled=1):
        get(engine, Fake())


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (ValueError("unknown operator\n  page\n  after page"), "ValueError: unknown operator"),
        (AssertionError(), "AssertionError"),
        (OSError(errno.ENOENT, "gone"), "FileNotFoundError: [Errno 2] gone"),
    ],
)
def test_any_other_failure_is_final(error: Exception, seen: str, engine: Engine) -> None:
    backend = Fake(error=error)
    with engine.counters.expect(compile_failures=1, graphs_compiled=0, cache_misses=1):
        problem = failure(engine, backend)
        assert str(problem) == f"fake could not compile Unit 4→8: {seen}"
        assert not problem.transient
        assert str(failure(engine, backend)) == str(problem)
    assert backend.compiles == 1


def test_a_backend_may_say_itself_why_it_failed(engine: Engine) -> None:
    error = CompileFailed("torch_blade built no engine.", transient=True)
    assert failure(engine, Fake(error=error)) is error


def test_a_graph_that_fails_on_its_first_call_is_not_used(engine: Engine) -> None:
    def spoil(result: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("kernel crashed")

    error = failure(engine, Fake(spoil=spoil))
    assert str(error) == "fake could not compile Unit 4→8: RuntimeError: kernel crashed"


@pytest.mark.parametrize(
    "cancel",
    [InterruptProcessingException("cancel"), NewerInterrupt("cancel"), KeyboardInterrupt()],
    ids=["older host", "newer host", "keyboard"],
)
def test_a_cancel_is_no_failure(cancel: BaseException, engine: Engine) -> None:
    with engine.counters.expect(compile_failures=0, graphs_compiled=0):
        with pytest.raises(type(cancel)) as caught:
            get(engine, Fake(error=cancel))
        assert caught.value is cancel
    with engine.counters.expect(graphs_compiled=1):
        get(engine, Fake())


def test_memory_errors_of_older_torch_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.OutOfMemoryError` is new in torch 2.5."""
    monkeypatch.delattr(torch, "OutOfMemoryError")
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("broken"))

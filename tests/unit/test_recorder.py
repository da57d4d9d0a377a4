"""The CUDA recorder as far as it is plain Python; tests/gpu runs the rest."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from blade_tests.unit.samples import CPU
from torch.utils._python_dispatch import TorchDispatchMode

from blade.blade_core import recorder
from blade.blade_core.backends.inductor import plain_addresses
from blade.blade_core.recorder import CudaRecorder

CUDA = torch.device("cuda", 0)
SYNC = "called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp:94.)"
MODE = "Synchronization debug mode is a prototype feature and does not yet detect all ..."


# --- what can be recorded -----------------------------------------------------------------------


def test_the_cpu_is_not_asked_about_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> bool:
        raise AssertionError("touches CUDA")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", asked)
    monkeypatch.setattr(torch.cuda, "_lazy_init", asked)
    assert CudaRecorder.usable(CPU) is False


@pytest.mark.parametrize("capturing", [True, False])
def test_not_inside_of_a_capture_by_others(
    capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert CudaRecorder.usable(CUDA) is not capturing


# --- what waits ---------------------------------------------------------------------------------


class SyncMode:
    """torch's switch that makes what waits for the device warn."""

    def __init__(self) -> None:
        self.mode: int | str = 0

    def set(self, mode: int | str) -> None:
        self.mode = mode
        warnings.warn(MODE, UserWarning, stacklevel=2)


@pytest.fixture
def sync_mode(monkeypatch: pytest.MonkeyPatch) -> SyncMode:
    switch = SyncMode()
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: switch.mode)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", switch.set)
    return switch


def warn(text: str, file: str = "/comfy/samplers.py", line: int = 7) -> None:
    warnings.warn_explicit(text, UserWarning, file, line)


def test_what_waits_is_named_by_file_and_line(sync_mode: SyncMode) -> None:
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        with CudaRecorder.waits() as found:
            assert sync_mode.mode == "warn"
            warn(SYNC, line=7)
            warn(SYNC, "/comfy/ldm/attention.py", 8)
            warn(SYNC, "/comfy/ldm/attention.py", 8)
    assert found == ["samplers.py:7", "attention.py:8", "attention.py:8"]
    assert [str(w.message) for w in others] == []


def test_nothing_waits(sync_mode: SyncMode) -> None:
    with CudaRecorder.waits() as found:
        pass
    assert found == []


def test_warnings_of_others_come_through(sync_mode: SyncMode) -> None:
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        with CudaRecorder.waits() as found:
            warn("xformers is old", "/packs/other.py", 3)
            warn(SYNC)
    assert found == ["samplers.py:7"]
    assert [(str(w.message), w.filename, w.lineno) for w in others] == [
        ("xformers is old", "/packs/other.py", 3)
    ]


def test_what_the_user_silenced_stays_silent(sync_mode: SyncMode) -> None:
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("ignore")
        with CudaRecorder.waits() as found:
            warn("xformers is old")
            warn(SYNC)  # seen all the same
    assert (found, others) == (["samplers.py:7"], [])


@pytest.mark.parametrize("mode", [0, 1])
def test_the_mode_is_as_it_was(mode: int, sync_mode: SyncMode) -> None:
    sync_mode.mode = mode
    with CudaRecorder.waits():
        pass
    assert sync_mode.mode == mode
    with pytest.raises(ZeroDivisionError), CudaRecorder.waits():
        raise ZeroDivisionError
    assert sync_mode.mode == mode


# --- recording ----------------------------------------------------------------------------------


class Cuda:
    """What torch.cuda is asked for while something is recorded, in its order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.streams = ["main"]
        self.seeded_on: list[str] = []
        self.valid = True
        self.is_async = False

    def say(self, text: str) -> Any:
        return lambda *args, **kwargs: self.log.append(text)

    def graph(self) -> Any:
        return SimpleNamespace(
            capture_begin=self.begin, capture_end=self.end, replay=self.say("replay")
        )

    def begin(self, *, pool: str, capture_error_mode: str) -> None:
        torch.zeros(1).fill_(7)  # as torch does with its seed
        self.log.append(f"begin {pool} {capture_error_mode} on {self.streams[-1]}")

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        self.streams.append("main" if stream is None else "its own")
        yield
        self.streams.pop()

    def end(self) -> None:
        self.log.append("end")
        if not self.valid:
            raise RuntimeError("capture invalidated")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    cuda = Cuda()
    stream = SimpleNamespace(wait_stream=cuda.say("wait"))
    for name, value in {
        "CUDAGraph": cuda.graph,
        "Stream": lambda device: stream,
        "stream": cuda.on,
        "current_stream": lambda device: None,
        "graph_pool_handle": lambda: "pool 1",
        "empty_cache": cuda.say("empty"),
        "get_allocator_backend": lambda: "cudaMallocAsync" if cuda.is_async else "native",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda._utils, "_get_device_index", lambda device: 0)
    for name, text in {
        "_cuda_clearCublasWorkspaces": "workspaces",
        "_cuda_endAllocateToPool": "off the pool",
        "_cuda_releasePool": "pool released",
    }.items():
        monkeypatch.setattr(torch._C, name, cuda.say(text), raising=False)
    yield cuda
    recorder._never_freed.clear()


def test_a_recording(cuda: Cuda) -> None:
    made = CudaRecorder(CPU)
    assert cuda.log == ["empty"]
    cuda.log.clear()
    replay = made.record(lambda: cuda.log.append("work"))
    # Other threads allocate meanwhile; cuBLAS's workspace is the capture's own from begin to end.
    begin = "begin pool 1 thread_local on its own"
    assert cuda.log == ["wait", "workspaces", begin, "work", "workspaces", "end"]
    replay()
    assert cuda.log[-1] == "replay"


def test_torch_seeds_a_recording_on_the_stream_that_works_anyway(cuda: Cuda) -> None:
    class Seeds(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            cuda.seeded_on.append(cuda.streams[-1])
            return function(*args, **(kwargs or {}))

    def work() -> None:
        torch.ones(1)

    made = CudaRecorder(CPU)
    with Seeds():
        made.record(work)
    assert cuda.seeded_on == ["main", "main", "its own"]  # zeros, fill_ and the work


def test_a_recording_that_breaks_off_is_ended_and_holds_nothing(cuda: Cuda) -> None:
    """What the kernels were given is freed within the recording, or torch ends the process."""
    error = RuntimeError("no such shape")
    held: list[weakref.ref[torch.Tensor]] = []
    at_end: list[bool] = []

    def layer() -> None:
        activation = torch.ones(1)
        held.append(weakref.ref(activation))
        raise error

    end = cuda.end

    def ending() -> None:
        at_end.append(held[0]() is None)
        end()

    cuda.end = ending  # type: ignore[method-assign]
    with pytest.raises(RuntimeError) as caught:
        CudaRecorder(CPU).record(layer)
    assert caught.value is error
    assert at_end == [True]
    assert cuda.log[-2:] == ["workspaces", "end"]
    assert recorder._never_freed == []


@pytest.mark.parametrize("seen_at", ["allocation", "end"])
def test_a_recording_that_became_invalid_gives_the_pool_back(
    seen_at: str, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Freeing what it had reserved would end the process: that is kept, and the error told."""
    held: list[weakref.ref[torch.Tensor]] = []

    def layer() -> None:
        activation = torch.ones(1)
        held.append(weakref.ref(activation))
        raise ZeroDivisionError

    def invalid(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")

    made = CudaRecorder(CPU)
    cuda.valid = seen_at == "allocation"
    with monkeypatch.context() as patch:
        if seen_at == "allocation":
            patch.setattr(torch, "empty", invalid)
        with pytest.raises(ZeroDivisionError) as caught:
            made.record(layer)
    assert cuda.log[-2:] == ["off the pool", "pool released"]
    del caught
    assert (held[0]() is not None) is (seen_at == "allocation")


def test_memory_is_released_where_there_is_no_driver(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(name: str) -> None:
        asked.append(name)
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", load)
    made = CudaRecorder(CPU)
    cuda.log.clear()
    made.release()
    assert (cuda.log, asked) == (["empty"], [])
    cuda.is_async = True  # what CUDA keeps for graphs is trimmed by the driver alone
    made.release()
    assert (cuda.log, len(asked)) == (["empty", "empty"], 1)


# --- Triton's launches --------------------------------------------------------------------------


class Launches:
    """An autotuner's `run` that keeps what it is given."""

    def __init__(self, autotuner: Any) -> None:
        self.autotuner = autotuner
        self.given: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        """Launch a kernel as a compiled graph does."""
        kernel = object.__new__(self.autotuner)
        return self.autotuner.run(kernel, *args, **kwargs)

    def run(self, kernel: Any, *args: Any, **kwargs: Any) -> str:
        assert isinstance(kernel, self.autotuner)
        self.given.append((*args, kwargs))
        return "launched"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    name = "torch._inductor.runtime.triton_heuristics"
    module = pytest.importorskip(name, exc_type=ImportError)
    launches = Launches(module.CachingAutotuner)
    run = launches.run
    monkeypatch.setattr(
        module.CachingAutotuner, "run", lambda self, *args, **kwargs: run(self, *args, **kwargs)
    )
    return launches


def test_kernels_are_given_addresses_inside_only(launches: Launches) -> None:
    before = launches.autotuner.run
    x, view = torch.ones(4), torch.ones(4)[1:]
    with plain_addresses():
        assert launches(x, 4, view, None, 0.5, stream=9) == "launched"
    assert launches.given == [(x.data_ptr(), 4, view.data_ptr(), None, 0.5, {"stream": 9})]
    assert launches.autotuner.run is before
    launches(x)
    assert launches.given[1][0] is x


def test_launches_are_as_they_were_after_an_error(launches: Launches) -> None:
    before = launches.autotuner.run
    with pytest.raises(ZeroDivisionError), plain_addresses():
        raise ZeroDivisionError
    assert launches.autotuner.run is before


@pytest.mark.parametrize("is_async", [True, False])
def test_addresses_are_for_the_async_allocator(
    is_async: bool, cuda: Cuda, launches: Launches
) -> None:
    """The driver knows the memory of torch's own allocator, and a check is worth having."""
    cuda.is_async = is_async
    x = torch.ones(4)

    def layer() -> None:
        launches(x)

    CudaRecorder(CPU).record(layer)
    (given, _), *_ = launches.given
    assert given == x.data_ptr() if is_async else given is x

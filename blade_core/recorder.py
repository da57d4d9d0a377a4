"""Recording work as a CUDA graph. Nothing here needs a GPU to be imported.

Source: torch.cuda.CUDAGraph and its notes, https://docs.pytorch.org/docs/stable/notes/cuda.html
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .backends.inductor import plain_addresses


class Recorder(Protocol):
    """How work on one device is recorded. What one recorder records shares one memory pool."""

    def __init__(self, device: torch.device) -> None: ...

    @staticmethod
    def usable(device: torch.device) -> bool:
        """Whether work on `device` can be recorded now."""
        ...

    @staticmethod
    def waits() -> AbstractContextManager[list[str]]:
        """Collect what waits for the device inside the block."""
        ...

    @staticmethod
    def wait(device: torch.device) -> None:
        """Until the device has done what it was given so far."""
        ...

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Call `function` and return what does the same device work again."""
        ...

    def used_bytes(self) -> int:
        """Device memory in use now; the difference is what a recording took."""
        ...

    def release(self) -> None:
        """Give the memory of recordings that are gone back to the device."""
        ...


class CudaRecorder:
    """CUDA graphs of one device, recorded on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle()
        # Cached blocks of the ordinary pool would stand beside those of this one.
        torch.cuda.empty_cache()

    @staticmethod
    def usable(device: torch.device) -> bool:
        # Not while another part of the host captures: a graph cannot be launched into a capture.
        return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()

    @staticmethod
    @contextmanager
    def waits() -> Iterator[list[str]]:
        # Found before recording: under cudaMallocAsync torch ends the process if a recording
        # becomes invalid.
        found: list[str] = []
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for warning in caught:
            text = str(warning.message)
            if "synchronizing CUDA operation" in text:
                found.append(f"{os.path.basename(warning.filename)}:{warning.lineno}")
            elif "debug mode" not in text:  # which torch says of every use of it
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )

    @staticmethod
    def wait(device: torch.device) -> None:
        torch.cuda.current_stream(device).synchronize()

    def used_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

    def release(self) -> None:
        if _thread.recording:
            return  # waiting for the device would spoil what this thread records
        torch.cuda.empty_cache()
        if _is_async():
            _trim_graph_memory(self._device)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """The kernels are not run while they are recorded. Weights, libraries' handles and
        Triton kernels must have been used before; nothing may wait for the device."""
        graph = torch.cuda.CUDAGraph()
        main = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream), _addresses(), _undisturbed():
            _forget_workspaces()
            with _OnStream(main):
                # Other threads of the host go on allocating meanwhile: they must not disturb.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                function()
                _forget_workspaces()
            except BaseException as error:
                self._abandon(graph, error)
                raise
            graph.capture_end()
        return graph.replay

    def _abandon(self, graph: torch.cuda.CUDAGraph, error: BaseException) -> None:
        """End a recording that `error` broke off, and what it had reserved."""
        try:
            # Memory of a recording is freed in that recording, or torch ends the process.
            torch.empty(1, device=self._device).zero_()
            traceback.clear_frames(error.__traceback__)
            _forget_workspaces()
            graph.capture_end()
        except RuntimeError:
            # It is invalid, and torch has not taken the stream off the pool.
            _never_freed.append(error)
            index = torch.cuda._utils._get_device_index(self._device)
            torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)


class _OnStream(TorchDispatchMode):
    """What is called inside runs on `stream`, whichever is the current one.

    Torch begins a recording with kernels of its own, which write the random seed. A stream that is
    only recorded launches nothing else; once a second stream of the process has launched eight,
    each kernel of every graph starts 0.2 us later, for good (docs/log.md).
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch.cuda.stream(self._stream):
            return function(*args, **(kwargs or {}))


class Aside:
    """A second stream within a recording: what is done inside goes on beside what comes after,
    until `join`. Whatever is allocated inside must be given back inside, too."""

    def __init__(self, device: torch.device) -> None:
        self._main = torch.cuda.current_stream(device)
        self._side = torch.cuda.Stream(device, priority=-1)  # others will wait for it
        self._context: Any = None
        self._joined = False

    def __enter__(self) -> None:
        self._side.wait_stream(self._main)
        self._context = torch.cuda.stream(self._side)
        self._context.__enter__()

    def __exit__(self, *_: object) -> None:
        _forget_workspaces()  # this stream's, before it is joined
        self._context.__exit__(None, None, None)

    def join(self) -> None:
        """Let the recording go on only when that is done; once is enough."""
        if not self._joined:
            self._joined = True
            self._main.wait_stream(self._side)


_never_freed: list[BaseException] = []
"""Recordings that became invalid, with the tensors in their frames: reserved, never taken."""


class _Thread(threading.local):
    recording = False


_thread = _Thread()
"""Whether this thread records now."""


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep Python's collector from freeing other models' GPU memory within a recording."""
    collects = gc.isenabled()
    gc.disable()
    _thread.recording = True
    try:
        yield
    finally:
        _thread.recording = False
        if collects:
            gc.enable()


def _addresses() -> AbstractContextManager[None]:
    return plain_addresses() if _is_async() else nullcontext()


def _is_async() -> bool:
    return torch.cuda.get_allocator_backend() == "cudaMallocAsync"


def _trim_graph_memory(device: torch.device) -> None:
    """What CUDA keeps for graphs that allocate; torch has no call for it.

    Source: CUDA driver API, cuDeviceGraphMemTrim.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    with suppress(OSError, AttributeError):
        ctypes.CDLL(name).cuDeviceGraphMemTrim(torch.cuda._utils._get_device_index(device))


def _forget_workspaces() -> None:
    """Let cuBLAS take its workspace anew: within a capture from the capture's own pool.

    Source: torch._inductor.cudagraph_trees.clear_cublas_manager.
    """
    torch._C._cuda_clearCublasWorkspaces()

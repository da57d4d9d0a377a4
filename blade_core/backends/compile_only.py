"""What Inductor leaves out in a process that compiles and runs nothing.

It makes a context of the GPU, half a gigabyte and most of a second, for the first fake tensor, to
load the kernels that it has compiled, and to run each once so as to choose where a kernel has
several configurations. Whoever loads such a kernel chooses then, as torch.compile does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_THREADS = 4
"""For one graph's kernels. Few have more than four that take long."""


@contextmanager
def compile_only() -> Iterator[None]:
    """Compile graphs for a GPU without using it, and the kernels of each beside each other.

    Reductions in several rounds do use it: by the registers that one takes once it is loaded,
    Inductor decides whether to compile it with smaller blocks, too. A torch that does not have
    what is changed here compiles as it always does.
    """
    try:
        changes = _changes()
        for owner, name, _ in changes:
            getattr(owner, name)
    except (ImportError, AttributeError):
        changes = []
    with ExitStack() as changed:
        for change in changes:
            changed.enter_context(_replaced(*change))
        yield


def _changes() -> list[tuple[Any, str, Any]]:
    """Owners, names and values of what is changed."""
    from torch._higher_order_ops import triton_kernel_wrap
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.fx_passes import misc_patterns
    from torch._inductor.runtime.hints import HeuristicType
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._subclasses import fake_tensor

    load: Any = CachingAutotuner._make_launchers

    def load_reduction(kernel: Any) -> None:
        if kernel.heuristic_type == HeuristicType.REDUCTION:
            load(kernel)

    # Torch 2.13 gave it another name.
    written = "identify_accessed_tensors"
    if not hasattr(triton_kernel_wrap, written):
        written = "identify_mutated_tensors"
    return [
        (fake_tensor, "init_gpu_context", lambda device: None),
        (fake_tensor.FakeTensorMode, "avoid_device_init", True),
        # Patterns of torch.randperm: their slices set the device, which CUDA takes for a use of it.
        (misc_patterns, "_misc_patterns_init", lambda *_: None),
        (CachingAutotuner, "_make_launchers", load_reduction),
        (PythonWrapperCodegen, "generate_and_run_autotune_block", _compile_kernels),
        (triton_kernel_wrap, written, remembered(getattr(triton_kernel_wrap, written))),
    ]


def _compile_kernels(code: Any) -> None:
    """All that a graph's code defines, where it would have been run to choose among
    configurations. The code finds them compiled."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.triton_bundler import TritonBundler

    found: list[tuple[str, str]] = []

    def note(_: Any, name: str, source: str, device_str: str = "cuda") -> None:
        found.append((name, source))

    with _replaced(AsyncCompile, "triton", note):
        exec(code.kernel_autotune_defs.getvalue(), {})
    kernels = [getattr(PyCodeCache.load(source), name) for name, source in found]
    # Each is noted for the artifact when the code asks for it.
    with (
        _replaced(TritonBundler, "put", lambda *_: None),
        ThreadPoolExecutor(_THREADS) as threads,
    ):
        for _ in threads.map(lambda kernel: kernel.precompile(warm_cache_only=True), kernels):
            pass


def remembered(find: Callable[..., Any]) -> Callable[..., Any]:
    """Inductor asks several times which arguments a kernel writes to, and each time has Triton
    parse it: a tenth of what a graph takes."""
    known: dict[Any, Any] = {}

    def find_once(kernel: Any, kwargs: dict[str, Any], *more: Any) -> Any:
        key = kernel, repr(more), tuple((name, _form(value)) for name, value in kwargs.items())
        if key not in known:
            known[key] = find(kernel, kwargs, *more)
        return known[key]

    return find_once


def _form(argument: Any) -> Any:
    """What of an argument a kernel is compiled for: a tensor's dtype, or a number."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype
    return argument.get_dtype() if hasattr(argument, "get_dtype") else repr(argument)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)

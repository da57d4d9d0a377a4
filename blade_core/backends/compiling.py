"""How Inductor compiles for a GPU that it does not use.

It makes a context of the GPU, half a gigabyte and most of a second, for the first fake tensor, to
load the kernels that it has compiled, and to run each once, so as to choose where a kernel has
several configurations. A process that does nothing but compile runs none: whoever first calls such
a kernel chooses, as with torch.compile. So its kernels need not be compiled one after the other.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

_THREADS = 4
"""For one graph's kernels. Few have more than four that take long."""


class _Change(NamedTuple):
    """Another value for an attribute of torch's."""

    owner: Any
    name: str
    value: Any


@contextmanager
def without_gpu() -> Iterator[None]:
    """Compile graphs for a GPU that is not used, the kernels of each beside each other.

    Reductions in several rounds do use it: by the registers that one takes once it is loaded,
    Inductor decides whether to compile it with smaller blocks, too. A torch that does not have
    what is changed here compiles as it always does.
    """
    try:
        changes = _changes()
    except (ImportError, AttributeError):
        changes = []
    with _changed(changes):
        yield


def _changes() -> list[_Change]:
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
    changes = [
        _Change(fake_tensor, "init_gpu_context", lambda device: None),
        _Change(fake_tensor.FakeTensorMode, "avoid_device_init", True),
        # Patterns of torch.randperm: their slices set the device, which CUDA takes for a use of it.
        _Change(misc_patterns, "_misc_patterns_init", lambda *_: None),
        _Change(CachingAutotuner, "_make_launchers", load_reduction),
        _Change(PythonWrapperCodegen, "generate_and_run_autotune_block", _compile_kernels),
        _Change(triton_kernel_wrap, written, remembered(getattr(triton_kernel_wrap, written))),
    ]
    for owner, name, _ in changes:
        getattr(owner, name)
    return changes


@contextmanager
def _changed(changes: Sequence[_Change]) -> Iterator[None]:
    before = [getattr(owner, name) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(changes, before, strict=True):
            setattr(owner, name, value)


def _compile_kernels(code: Any) -> None:
    """All that a graph's code defines, where it would have been run to choose among
    configurations. The code finds them compiled."""
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.triton_bundler import TritonBundler

    found = kernels_of(code.kernel_autotune_defs.getvalue())
    kernels = [getattr(PyCodeCache.load(source), name) for name, source in found]
    # Each is noted for the artifact when the code asks for it.
    not_yet = _Change(TritonBundler, "put", lambda *_: None)
    with _changed([not_yet]), ThreadPoolExecutor(_THREADS) as threads:
        for _ in threads.map(lambda kernel: kernel.precompile(warm_cache_only=True), kernels):
            pass


def kernels_of(definitions: str) -> list[tuple[str, str]]:
    """Names and sources in `name = async_compile.triton('name', 'source', ...)`."""
    calls = (node for node in ast.walk(ast.parse(definitions)) if isinstance(node, ast.Call))
    return [
        (ast.literal_eval(call.args[0]), ast.literal_eval(call.args[1]))
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "triton"
    ]


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

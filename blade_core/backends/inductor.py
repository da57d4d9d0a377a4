"""TorchInductor, without Dynamo and without guards.

The traced graph goes straight to `torch._inductor.standalone_compile`, whose result can be
stored and loaded without tracing. Where this torch does not have it (before 2.8),
`torch._inductor.compile` gives the same code, but nothing to store.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ..errors import NotPrivate, first_line, is_cancel, is_out_of_memory
from ..graph import Compiled, GraphFunction, GraphRequest, trace
from ..kernels.passes import KERNELS, OPAQUE, OPERATORS, use_kernels
from ..key import set_switches, switches
from ..log import warn_once
from ..private import why_not_private
from ..travel import pack, unpack
from . import standalone
from .compiling import without_gpu

_Built = TypeVar("_Built")

_MIN_CAPABILITY = (7, 0)  # Triton's own limit
_KERNELS_CAPABILITY = (8, 0)  # Blade's own kernels were written for tensor cores of that age


@dataclass(frozen=True)
class InductorBackend:
    """kernels: which of Blade's own kernels take the place of ATen's operators on a GPU."""

    kernels: tuple[str, ...] = tuple(KERNELS)
    name = "inductor"
    channels_last = True
    capturable = True

    def available(self, device: torch.device) -> str | None:
        if device.type not in ("cpu", "cuda"):
            return f"Blade has not been tried on {device.type!r} devices"
        on_gpu = device.type == "cuda"
        reason = _no_triton(device) if on_gpu else _no_cpp_compiler(os.environ.get("CXX"))
        if reason is None and not standalone.keeps_graphs():
            warn_once(
                f"torch {torch.__version__} cannot keep compiled graphs (2.8 and newer can): Blade "
                "compiles them in this process, and again after each restart."
            )
        return reason

    def preload(self) -> None:
        with suppress(ImportError):  # of older torch
            import torch._inductor.compile_fx
            import torch._inductor.lowering
            import torch._inductor.standalone_compile  # noqa: F401

            for operator in OPERATORS:
                operator()
            _digest_packages()

    def joins(self, device: torch.device) -> bool:
        return "joint_linear" in self.kernels and _runs_kernels(device)

    def fingerprint(self) -> str:
        options = " ".join(
            f"{key}={value}" for key, value in sorted(standalone.all_options().items())
        )
        kernels = " ".join(f"{name}={KERNELS[name]}" for name in sorted(self.kernels))
        return f"inductor {torch.__version__} {options} {kernels}"

    def compile(self, request: GraphRequest) -> Compiled:
        return self._with_kernels(
            request.device, lambda: trace(request), lambda module: standalone.build(module, request)
        )

    def job(self, request: GraphRequest) -> bytes | None:
        if request.frozen or not standalone.keeps_graphs():
            return None
        if _not_private() is not None:  # it could not be loaded here
            return None
        patches = standalone.patches_for(request.inputs)
        return pickle.dumps(tuple(_Job(pack(trace(request)), self.kernels, switches(), patches)))

    def compile_job(self, job: bytes) -> bytes:
        todo = _Job(*pickle.loads(job))
        set_switches(todo.switches)
        try:
            with without_gpu():
                return self._compile_alone(todo)
        except Exception as error:  # where this torch needs what was taken from it
            if is_cancel(error) or is_out_of_memory(error):
                raise
            return self._compile_alone(todo)

    def _compile_alone(self, todo: _Job) -> bytes:
        first = next(iter(todo.trace().graph.nodes)).meta["val"]
        build = replace(self, kernels=todo.kernels)._with_kernels
        return build(
            first.device, todo.trace, partial(standalone.build_artifact, patches=todo.patches)
        )

    def _with_kernels(
        self,
        device: torch.device,
        trace: Callable[[], torch.fx.GraphModule],
        build: Callable[[torch.fx.GraphModule], _Built],
    ) -> _Built:
        """Build what is traced with Blade's kernels, or without where they cannot be compiled."""
        module = trace()
        if not _runs_kernels(device) or not use_kernels(module, self.kernels):
            return build(module)
        try:
            return build(module)
        except Exception as error:  # whatever Triton raises where it cannot compile them
            if is_cancel(error) or is_out_of_memory(error):
                raise
            warn_once(f"Blade's own kernels cannot be compiled here: {first_line(error)}")
            return build(trace())

    def load(self, artifact: bytes, request: GraphRequest) -> GraphFunction:
        return self.load_for(request.device, artifact, frozen=request.frozen)

    def load_for(
        self, device: torch.device, artifact: bytes, *, frozen: bool = False
    ) -> GraphFunction:
        """The same where there is no request yet."""
        from torch._inductor import CompiledArtifact, config

        for operator in OPAQUE:
            operator()
        reason = _not_private()
        if reason is not None:
            raise NotPrivate(reason)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "graph")
            with open(path, "wb") as file:
                file.write(artifact)
            # A GPU's kernels are in it. Torch would get a pool of processes ready to compile them
            # all the same, and while those import it, work of the host's on the CPU stands still.
            no_pool = device.type == "cuda"
            with config.patch(compile_threads=1) if no_pool else nullcontext():
                loaded = CompiledArtifact.load(path=path)
            return standalone.function_of(loaded, frozen=frozen)


def _digest_packages() -> None:
    """Let torch read its own files and Triton's, by whose digests it tells versions apart. It does
    so for the first graph, loaded or compiled, and remembers them: half a second."""
    with suppress(ImportError, AttributeError, OSError, RuntimeError):
        from torch._inductor.codecache import torch_key
        from torch._inductor.runtime.triton_compat import triton_key

        torch_key()
        triton_key()  # a RuntimeError where there is no Triton


def _not_private() -> str | None:
    """Why nothing is loaded: torch would unpack code into a folder of others."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir())
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    reason = why_not_private(folder)
    if reason is None:
        return None
    return (
        "Blade does not load compiled graphs from disk: torch would unpack them into "
        f"{folder}, but {reason}. Set TORCHINDUCTOR_CACHE_DIR to a folder of your own."
    )


@contextmanager
def plain_addresses() -> Iterator[None]:
    """Launch Triton kernels by their arguments' addresses while a CUDA graph is recorded.

    Triton asks the driver about each tensor's pointer, and under cudaMallocAsync, ComfyUI's
    default, the driver does not know memory that a recording has only reserved. It does not
    ask about plain integers. Source: triton third_party/nvidia/backend/driver.py, getPointer;
    the same failure: https://github.com/state-spaces/mamba/issues/699
    """
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    run = CachingAutotuner.run

    def run_by_address(self: Any, *args: Any, **kwargs: Any) -> Any:
        addresses = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
        return run(self, *addresses, **kwargs)

    autotuner: Any = CachingAutotuner
    autotuner.run = run_by_address
    try:
        yield
    finally:
        autotuner.run = run


class _Job(NamedTuple):
    """A graph for another process, traced, before any pass."""

    graph: bytes
    kernels: tuple[str, ...]
    switches: dict[str, bool]
    patches: dict[str, Any]

    def trace(self) -> torch.fx.GraphModule:
        return unpack(self.graph)


@lru_cache
def _no_cpp_compiler(cxx: str | None) -> str | None:
    """`cxx` is the environment's choice, for the message."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError) as error:
        chosen = f" (CXX is {cxx!r})" if cxx else ""
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return (
            f"no working C++ compiler was found{chosen}: {reason}. Install g++ or clang "
            "(Windows: Visual Studio Build Tools), or set CXX"
        )
    return None


@lru_cache
def _runs_kernels(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= _KERNELS_CAPABILITY
    )


@lru_cache
def _no_triton(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _MIN_CAPABILITY:
        return (
            f"the GPU has compute capability {capability[0]}.{capability[1]}; "
            f"Triton needs {_MIN_CAPABILITY[0]}.{_MIN_CAPABILITY[1]}"
        )
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}). Install triton (Windows: triton-windows)"
    return None

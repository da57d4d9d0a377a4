"""torch_blade (PAI-Blade, BladeDISC): TorchScript whose supported parts are DISC engines.

It exists for torch 1.13 to 2.0.1. Of what goes wrong it raises little: a trace that fails, a
cluster that its compiler refuses and a dtype that it does not know all give a module that works
and is no faster. So this file asks for every condition first and checks what comes back.

DISC's runtime makes every input contiguous in each call, weights too: channels-last weights are
copied each time. The package's cure, `patch_conv2d`, cannot be used: it traces `forward` of each
convolution symbolically, which ComfyUI's `forward(*args, **kwargs)` does not allow, and when it
fails it leaves `torch.nn.functional.conv2d` replaced for the whole process.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import logging
import os
import re
import runpy
import threading
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import BackendUnavailable, CompileFailed, first_line
from ..graph import Compiled, GraphFunction, GraphRequest

_PIPELINE = "DISC"
_COMPILER = "disc_compiler_main"  # a program beside the package's own files
_DTYPES = (torch.float32, torch.float16)  # of bfloat16 DISC builds nothing, without a word
_RESOURCES = ("out of memory", "No space left")  # in warnings: the next run may have more

_compiling = threading.Lock()
"""`optimize` of two threads at a time fails with "Can't redefine method"."""


class TorchBladeBackend:
    name = "torch_blade"
    channels_last = False  # its runtime copies every tensor that is not contiguous
    capturable = False  # weights are set in Python before each call

    def available(self, device: torch.device) -> str | None:
        if device.type not in ("cpu", "cuda"):
            return f"torch_blade has no compiler for {device.type!r} devices"
        package = _probe()
        if isinstance(package, str):
            return package
        if device.type == "cuda" and not package.version.cuda_available:
            return f"torch_blade {package.version.__version__} was built without CUDA"
        if device.type == "cuda" and not torch.cuda.is_available():
            return "torch finds no CUDA GPU"
        return None

    def preload(self) -> None:
        """It looks for a GPU while it is imported."""

    def joins(self, device: torch.device) -> bool:
        return False

    def fingerprint(self) -> str:
        package = _probe()
        if isinstance(package, str):
            return "torch_blade unavailable"
        version = package.version
        return f"torch_blade {version.__version__} torch={version.torch_version} {_PIPELINE}"

    def compile(self, request: GraphRequest) -> Compiled:
        package = _require()
        _check_tensors(request)
        # `optimize` copies the module, so for a moment this unit's weights exist twice on the
        # device. Those of a frozen graph are also in the artifact and in the engines: host RAM.
        module = _with_live_weights(request)
        with _compiling, _only_on(request.device), _Heard() as heard, _config(package, request):
            optimized = package.optimize(
                module, allow_tracing=True, model_inputs=tuple(request.inputs)
            )
        _check_result(package, optimized, request, heard)
        if not request.frozen:
            for tensor, _ in _slots(optimized, request):
                tensor.data = tensor.data.new_empty(0)
        stream = io.BytesIO()
        torch.jit.save(optimized, stream)
        artifact = stream.getvalue()
        nbytes = len(artifact)
        if request.frozen:
            nbytes += sum(w.nbytes for w in request.weights)
        # A traced module keeps the inputs that it was traced with in VRAM; a loaded one does not.
        return Compiled(self.load(artifact, request), artifact, nbytes)

    def job(self, request: GraphRequest) -> bytes | None:
        return None  # it wants the live module and its weights

    def compile_job(self, job: bytes) -> bytes:
        raise NotImplementedError

    @torch.inference_mode(False)  # or the graph's own tensors would be refused outside of it
    def load(self, artifact: bytes, request: GraphRequest) -> GraphFunction:
        _require()  # importing it registers the engines' class
        module = torch.jit.load(io.BytesIO(artifact), map_location=request.device)
        return _function(module, request)


@lru_cache(maxsize=1)
def _probe() -> ModuleType | str:
    """Return the package, imported, or why it cannot be used."""
    try:
        spec = importlib.util.find_spec("torch_blade")
        if spec is None:
            return "torch_blade is not installed"
        assert spec.submodule_search_locations, "it is not a package"
        folder = spec.submodule_search_locations[0]
        # Read, not imported: libraries built for another torch must not get into the process.
        version = runpy.run_path(os.path.join(folder, "version.py"))
        built_for = version["torch_version"]
        if _release(built_for) != _release(torch.__version__):
            return (
                f"torch_blade {version['__version__']} was built for torch {built_for}, "
                f"this is torch {torch.__version__}"
            )
        # Read at import. The keys of that cache leave out constants: it mixes up layers.
        os.environ.pop("TORCH_BLADE_ENABLE_COMPILATION_CACHE", None)
        with warnings.catch_warnings():  # the import mutes all warnings of the process
            package = importlib.import_module("torch_blade")
            pipelines = importlib.import_module("torch_blade.config").OptPipelines.pipelines
    except Exception as error:  # AttributeError and OSError were seen besides ImportError
        return f"torch_blade is installed but cannot be imported ({first_line(error)})"
    if _PIPELINE not in pipelines:
        return (
            f"torch_blade {package.version.__version__} was built without its {_PIPELINE} "
            f"compiler (built in: {', '.join(pipelines) or 'none'})"
        )
    if not os.path.isfile(os.path.join(folder, _COMPILER)):
        return (
            f"torch_blade {package.version.__version__} is incomplete: "
            f"there is no {_COMPILER} in {folder}"
        )
    return package


def _release(version: str) -> str:
    return str(version).split("+")[0]


def _require() -> ModuleType:
    package = _probe()
    if isinstance(package, str):
        raise BackendUnavailable(f"{package}. Choose backend inductor.")
    return package


def _check_tensors(request: GraphRequest) -> None:
    for tensor in (*request.weights, *request.inputs):
        if tensor.dtype not in _DTYPES:
            raise CompileFailed(
                f"torch_blade compiles float32 and float16, but {request.key.label} has "
                f"{str(tensor.dtype).removeprefix('torch.')}. Choose backend inductor."
            )
        if tensor.device != request.device:
            raise CompileFailed(
                f"torch_blade wants all tensors on one device, but {request.key.label} has some "
                f"on {tensor.device} and some on {request.device}. Choose backend inductor."
            )


def _with_live_weights(request: GraphRequest) -> nn.Module:
    """A copy of the module that holds the request's weights themselves, in eval mode.

    In training mode the package would skip freezing and most passes without a word.
    """
    places = _weight_places(request)
    memo: dict[int, Any] = {}
    for name, tensor in _named_tensors(request.module):
        if name not in places:
            raise CompileFailed(f"{name} of {request.key.label} is not among its weights.")
        live = request.weights[places[name]]
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(live, requires_grad=False) if is_parameter else live
    return copy.deepcopy(request.module, memo).eval()


def _weight_places(request: GraphRequest) -> dict[str, int]:
    """Index in `weights` by name. A tensor of several names is listed once, but traced as many."""
    listed = {name: index for index, name in enumerate(request.names)}
    tensors = _named_tensors(request.module)
    by_tensor = {id(tensor): listed[name] for name, tensor in tensors if name in listed}
    return {name: by_tensor[id(tensor)] for name, tensor in tensors if id(tensor) in by_tensor}


def _named_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]


def _config(package: ModuleType, request: GraphRequest) -> AbstractContextManager[Any]:
    """The options, which `optimize` reads from the context of its thread."""
    config = package.Config()
    options = {
        "optimization_pipeline": _PIPELINE,
        "freeze_module": request.frozen,
        "enable_fp16": request.inputs[0].dtype == torch.float16,
    }
    for name, value in options.items():
        if not hasattr(config, name):  # setting a name that it does not know changes nothing
            raise CompileFailed(
                f"torch_blade {package.version.__version__} has no option {name}. "
                "Choose backend inductor."
            )
        setattr(config, name, value)
    context: AbstractContextManager[Any] = config
    return context


def _only_on(device: torch.device) -> AbstractContextManager[Any]:
    """DISC's runtime refuses CUDA tensors that are not on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _Heard(logging.Handler):
    """What the package warns of: the only place where it says why it gave up."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("torch_blade").addHandler(self)
        return self.messages

    def __exit__(self, *_: object) -> None:
        logging.getLogger("torch_blade").removeHandler(self)


def _check_result(
    package: ModuleType, optimized: object, request: GraphRequest, heard: list[str]
) -> None:
    if not isinstance(optimized, torch.jit.ScriptModule):
        problem = "could not trace {}, and gave back plain Python"
    elif not isinstance(optimized, torch.jit.TopLevelTracedModule):
        problem = "could not trace {}, and scripted it instead, which may compute another thing"
    elif not package.mlir.num_engines(optimized):
        problem = "built no engine for {}, so that it would be no faster"
    elif request.frozen and optimized.state_dict():
        problem = "did not fold all weights of {}"
    else:
        return
    why = next((line for message in heard for line in message.strip().splitlines()), "")
    raise CompileFailed(
        f"torch_blade {problem.format(request.key.label)}{why and f' ({why})'}. "
        "Choose backend inductor.",
        transient=any(words in message for message in heard for words in _RESOURCES),
    )


def _function(module: torch.jit.ScriptModule, request: GraphRequest) -> GraphFunction:
    device = request.device

    def run(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        # A failing engine raises: what DISC calls its fallback is not compiled in by default.
        with torch.no_grad(), _only_on(device):
            try:
                result: torch.Tensor = module(*inputs)
            except RuntimeError as error:
                # TorchScript hides the type of every error, and its text under two tracebacks.
                found = re.search(r"^(?:RuntimeError: )+(.+)", str(error), re.MULTILINE)
                text = found[1] if found else str(error)
                kind = torch.cuda.OutOfMemoryError if "out of memory" in text else RuntimeError
                raise kind(text) from error
            return result

    if request.frozen:
        return lambda _, inputs: run(inputs)

    slots = [(slot, index, slot.data) for slot, index in _slots(module, request)]
    lock = threading.Lock()  # one graph serves all units of its structure, from any thread

    def call(weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        # Set each time, so that no weight can be missed that was edited, replaced or moved; and
        # let go each time, or an unloaded model would stay in VRAM. Both take 0.4 us a weight.
        with lock:
            try:
                for slot, index, _ in slots:
                    slot.data = weights[index]
                return run(inputs)
            finally:
                for slot, _, nothing in slots:
                    slot.data = nothing

    return call


def _slots(module: torch.jit.ScriptModule, request: GraphRequest) -> list[tuple[torch.Tensor, int]]:
    """Each tensor that `module` holds, with its index in the weights."""
    places = _weight_places(request)
    held = module.state_dict(keep_vars=True)
    differing = sorted(places.keys() ^ held.keys())
    if differing:
        raise CompileFailed(
            f"torch_blade changed the weights' names of {request.key.label}: "
            f"{', '.join(differing)}. Choose backend inductor."
        )
    return [(tensor, places[name]) for name, tensor in held.items()]

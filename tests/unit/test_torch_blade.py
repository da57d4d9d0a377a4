"""The torch_blade backend, against a stand-in that has the real package's traps."""

from __future__ import annotations

import importlib
import itertools
import logging
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from blade.blade_core.backends import torch_blade as backend_module
from blade.blade_core.backends.torch_blade import TorchBladeBackend
from blade.blade_core.config import OptimizeConfig
from blade.blade_core.engine import Engine
from blade.blade_core.errors import BackendUnavailable, CompileFailed, is_out_of_memory
from blade.blade_core.graph import GraphRequest, Positional, Static, skeleton
from blade.blade_core.key import GraphKey, TensorSpec, digest, environment, layout
from blade.blade_core.structure import describe

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

STAND_IN = Path(__file__).resolve().parent.parent / "torch_blade_stand_in" / "torch_blade"
CPU = torch.device("cpu")
TORCH = torch.__version__.split("+")[0]
VERSION = f"0.2.0+{TORCH}"

Install = Callable[..., Path]
Mode = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Make one build of the stand-in importable; its `torch_blade` is imported by the backend."""

    def install(
        *, version: str = "", build: str = "", compiler: bool = True, last_line: str = ""
    ) -> Path:
        folder = tmp_path / "torch_blade"
        shutil.copytree(STAND_IN, folder, ignore=shutil.ignore_patterns("__pycache__"))
        for name, text in (("version", version), ("build", build), ("__init__", last_line)):
            with (folder / f"{name}.py").open("a") as file:
                file.write(f"\n{text}\n")
        if compiler:
            (folder / "disc_compiler_main").touch()
        monkeypatch.syspath_prepend(str(tmp_path))
        return folder

    forget()
    yield install
    forget()


def forget() -> None:
    """Take the package out of the process, and the operator that it registered."""
    backend_module._probe.cache_clear()
    mlir = sys.modules.get("torch_blade.mlir")
    if mlir is not None:
        mlir.library._destroy()
    for name in [n for n in sys.modules if n.split(".")[0] == "torch_blade"]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def package(install: Install) -> ModuleType:
    """A stand-in that works, imported by the backend."""
    install()
    assert TorchBladeBackend().available(CPU) is None
    return sys.modules["torch_blade"]


class Unit(nn.Module):
    """Parameters, one of them unused and one of two names, buffers, and a static argument."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 16, 3, padding=1)
        self.emb = nn.Linear(64, 64)
        self.tied = nn.Linear(64, 64)
        self.tied.weight = self.emb.weight
        self.narrow = nn.Linear(64, 16)
        self.norm = nn.GroupNorm(4, 16)
        self.last = nn.Conv2d(16, 4, 3, padding=1)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("shift", torch.randn(4, 1, 1))
        self.register_buffer("gain", torch.randn(4, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, scale: float) -> torch.Tensor:
        h = self.norm(self.first(x) + self.narrow(self.tied(self.emb(emb)))[:, :, None, None])
        out = self.last(nn.functional.silu(h)) * scale * self.get_buffer("gain")
        return x + out + self.get_buffer("shift")


class Single(nn.Module):
    """One operation: a cluster that DISC finds too small."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Plain(nn.Module):
    """Can be scripted as a whole, unlike `Positional`."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.unit(x)
        return result


def inputs(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, 8, 8), (2, 64))
    return tuple(torch.randn(s, generator=generator).to(dtype) for s in shapes)


def names_of(unit: nn.Module) -> list[str]:
    return [name for name, _ in (*unit.named_parameters(), *unit.named_buffers())]


def weights_of(unit: nn.Module) -> tuple[torch.Tensor, ...]:
    return tuple(t.detach() for t in (*unit.parameters(), *unit.buffers()))


def request_of(
    unit: nn.Module | None = None,
    args: Sequence[Any] | None = None,
    *,
    frozen: bool = False,
    channels_last: bool = False,
) -> GraphRequest:
    """What the host asks for when it first runs `unit` with `args`."""
    unit = Unit() if unit is None else unit
    args = (*inputs(), 0.5) if args is None else args
    statics = tuple(None if isinstance(a, torch.Tensor) else Static(a) for a in args)
    tensors = tuple(a for a in args if isinstance(a, torch.Tensor))
    weights = weights_of(unit)
    return GraphRequest(
        key=GraphKey(
            structure=digest(describe(unit)),
            signature=tuple(TensorSpec.of(a) if isinstance(a, torch.Tensor) else a for a in args),
            layout=layout(weights),
            backend=TorchBladeBackend().fingerprint(),
            environment=environment(CPU),
            frozen=digest([w.tolist() for w in weights]) if frozen else None,
            label="Unit",
        ),
        module=skeleton(Positional(unit, statics, channels_last=channels_last)),
        names=tuple(f"unit.{name}" for name in names_of(unit)),
        weights=weights,
        inputs=tensors,
    )


def assert_equal_to_eager(
    call: Callable[..., torch.Tensor],
    request: GraphRequest,
    weights: Sequence[torch.Tensor] | None = None,
) -> None:
    weights = request.weights if weights is None else weights
    expected = request.eager(weights, request.inputs)
    torch.testing.assert_close(call(weights, request.inputs), expected)


def problem(request: GraphRequest) -> CompileFailed:
    with pytest.raises(CompileFailed) as caught:
        TorchBladeBackend().compile(request)
    return caught.value


def failing(message: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """An engine that fails when it runs."""

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(message)

    return fail


# --- whether it can run -----------------------------------------------------------------------


def test_absent(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_blade", None)
    backend = TorchBladeBackend()
    assert backend.available(CPU) == "torch_blade is not installed"
    assert backend.fingerprint() == "torch_blade unavailable"
    with pytest.raises(BackendUnavailable, match=r"^torch_blade is not installed\. Choose"):
        backend.compile(request_of())
    with pytest.raises(BackendUnavailable, match=r"^torch_blade is not installed\. Choose"):
        backend.load(b"", request_of())


def test_works(install: Install) -> None:
    install()
    backend = TorchBladeBackend()
    assert backend.available(CPU) is None
    assert backend.fingerprint() == f"torch_blade {VERSION} torch={TORCH} DISC"


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        (
            "raise ImportError('undefined symbol: _ZN3c10')",
            "ImportError: undefined symbol: _ZN3c10",
        ),
        ("raise AttributeError('DataClassVariable')", "AttributeError: DataClassVariable"),
        ("raise OSError('libcudart.so.11.0: gone')", "OSError: libcudart.so.11.0: gone"),
    ],
)
def test_import_fails(install: Install, line: str, seen: str) -> None:
    install(last_line=line)
    expected = f"torch_blade is installed but cannot be imported ({seen})"
    assert TorchBladeBackend().available(CPU) == expected


def test_never_built(install: Install) -> None:
    """A checkout without a build has no `version.py`."""
    path = install() / "version.py"
    path.unlink()
    assert TorchBladeBackend().available(CPU) == (
        "torch_blade is installed but cannot be imported "
        f"(FileNotFoundError: [Errno 2] No such file or directory: {str(path)!r})"
    )


def test_built_for_another_torch(install: Install) -> None:
    install(version="torch_version = '2.0.1'; __version__ = '0.2.0+2.0.1.cu118'")
    assert TorchBladeBackend().available(CPU) == (
        "torch_blade 0.2.0+2.0.1.cu118 was built for torch 2.0.1, "
        f"this is torch {torch.__version__}"
    )
    assert "torch_blade" not in sys.modules  # its libraries were not loaded


def test_local_part_of_torch_version_does_not_count(install: Install) -> None:
    install(version=f"torch_version = '{TORCH}+cu999'")
    assert TorchBladeBackend().available(CPU) is None


@pytest.mark.parametrize(("built", "seen"), [([], "none"), (["TensorRT"], "TensorRT")])
def test_no_pipeline(install: Install, built: list[str], seen: str) -> None:
    install(build=f"pipelines = {built}")
    expected = f"torch_blade {VERSION} was built without its DISC compiler (built in: {seen})"
    assert TorchBladeBackend().available(CPU) == expected


def test_no_compiler_program(install: Install) -> None:
    folder = install(compiler=False)
    expected = f"torch_blade {VERSION} is incomplete: there is no disc_compiler_main in {folder}"
    assert TorchBladeBackend().available(CPU) == expected


def test_cuda(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    cuda = torch.device("cuda")
    expected = f"torch_blade {VERSION} was built without CUDA"
    assert TorchBladeBackend().available(cuda) == expected
    monkeypatch.setattr(sys.modules["torch_blade"].version, "cuda_available", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert TorchBladeBackend().available(cuda) == "torch finds no CUDA GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert TorchBladeBackend().available(cuda) is None


@pytest.mark.parametrize("kind", ["mps", "xpu", "meta"])
def test_other_devices(install: Install, kind: str) -> None:
    install()
    expected = f"torch_blade has no compiler for '{kind}' devices"
    assert TorchBladeBackend().available(torch.device(kind)) == expected


def test_probes_once(install: Install) -> None:
    folder = install()
    assert TorchBladeBackend().available(CPU) is None
    shutil.rmtree(folder)
    assert TorchBladeBackend().available(CPU) is None


def test_import_leaves_warnings_alone(install: Install) -> None:
    install()
    before = list(warnings.filters)
    assert TorchBladeBackend().available(CPU) is None
    assert list(warnings.filters) == before
    forget()
    with warnings.catch_warnings():  # what it does to everyone else
        importlib.import_module("torch_blade")
        assert list(warnings.filters) != before


def test_compilation_cache_is_off(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_BLADE_ENABLE_COMPILATION_CACHE", "1")
    install()
    assert TorchBladeBackend().available(CPU) is None
    assert sys.modules["torch_blade"].mlir.disc_cache is None
    forget()
    monkeypatch.setenv("TORCH_BLADE_ENABLE_COMPILATION_CACHE", "1")
    with warnings.catch_warnings():
        assert importlib.import_module("torch_blade").mlir.disc_cache is not None


# --- the stand-in's own traps: without these, the tests behind could not fail -----------------


def test_stand_in_swallows_failures(package: ModuleType) -> None:
    module, tensors = Plain().eval(), (torch.randn(2, 4),)
    traced = package.optimize(module, True, tensors)
    assert isinstance(traced, torch.jit.TopLevelTracedModule)
    assert package.mlir.num_engines(traced) == 1
    assert package.mlir.num_compiled_nodes(traced) == 3
    assert not traced.state_dict()
    training = package.optimize(Plain(), True, tensors)
    assert list(training.state_dict()) == list(module.state_dict())
    with pytest.raises(AssertionError):
        package.optimize(module, True, list(tensors))
    with_none = package.optimize(
        Positional(Unit(), (None,) * 3, channels_last=False), True, (None,)
    )
    assert not isinstance(with_none, torch.jit.ScriptModule)
    half = package.optimize(module.bfloat16(), True, (tensors[0].bfloat16(),))
    assert package.mlir.num_engines(half) == 0


def test_stand_in_configures_by_thread(package: ModuleType) -> None:
    config = package.Config()
    config.freeze_modul = False  # no such option
    with config, ThreadPoolExecutor(1) as pool:
        assert package.Config.get_current_context_or_new() is config
        assert pool.submit(package.Config.get_current_context_or_new).result() is not config
    assert package.Config.get_current_context_or_new() is not config


def test_stand_in_needs_its_compiler(package: ModuleType) -> None:
    Path(package.__file__ or "").with_name("disc_compiler_main").unlink()
    result = package.optimize(Plain().eval(), True, (torch.randn(2, 4),))
    assert package.mlir.num_engines(result) == 0


# --- compiling --------------------------------------------------------------------------------


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


# --- weights ----------------------------------------------------------------------------------


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


# --- running ----------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["weights", "frozen"])
def test_errors_of_a_call_reach_the_caller(package: ModuleType, frozen: bool) -> None:
    request = request_of(frozen=frozen)
    call = TorchBladeBackend().compile(request).call
    package.switches.during_run = failing("Device changed during inference")
    with pytest.raises(RuntimeError) as caught:
        call(request.weights, request.inputs)
    assert str(caught.value) == "Device changed during inference"
    assert not is_out_of_memory(caught.value)
    package.switches.during_run = failing("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(RuntimeError) as caught:
        call(request.weights, request.inputs)
    assert str(caught.value) == "CUDA out of memory. Tried to allocate 2.00 GiB"
    assert is_out_of_memory(caught.value)
    package.switches.during_run = None
    assert_equal_to_eager(call, request)


# --- artifacts --------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["weights", "frozen"])
def test_load(package: ModuleType, frozen: bool) -> None:
    backend = TorchBladeBackend()
    request = request_of(frozen=frozen)
    other = weights_of(Unit())
    compiled = backend.compile(request)
    assert compiled.artifact is not None
    call = backend.load(compiled.artifact, request)
    assert_equal_to_eager(call, request)
    if frozen:
        expected = request.eager(request.weights, request.inputs)
        torch.testing.assert_close(call(other, request.inputs), expected)
    else:
        assert_equal_to_eager(call, request, other)
        assert_equal_to_eager(call, request)


def test_load_imports_the_package(package: ModuleType) -> None:
    """In a new process nobody has: TorchScript does not know what an engine is."""
    backend = TorchBladeBackend()
    request = request_of()
    path = Path(package.__file__ or "").with_name("artifact.pt")
    artifact = backend.compile(request).artifact
    assert artifact is not None
    path.write_bytes(artifact)
    forget()
    with pytest.raises(RuntimeError, match="Unknown builtin op: torch_blade::engine"):
        torch.jit.load(path)
    assert_equal_to_eager(TorchBladeBackend().load(artifact, request), request)


def test_load_of_another_units_artifact(package: ModuleType) -> None:
    backend = TorchBladeBackend()
    artifact = backend.compile(request_of(Plain(), (torch.randn(2, 4),))).artifact
    assert artifact is not None
    with pytest.raises(CompileFailed, match=r"^torch_blade changed the weights' names of Unit: "):
        backend.load(artifact, request_of())


def test_artifact_has_weights_only_if_frozen(package: ModuleType) -> None:
    backend = TorchBladeBackend()
    unit = Unit()
    compiled = backend.compile(request_of(unit))
    frozen = backend.compile(request_of(unit, frozen=True))
    assert compiled.artifact is not None and frozen.artifact is not None
    for weight in (unit.first.weight, unit.emb.weight):
        stored = weight.detach().numpy().tobytes()
        assert stored not in compiled.artifact
        assert stored in frozen.artifact
    assert compiled.nbytes == len(compiled.artifact)
    assert frozen.nbytes == len(frozen.artifact) + sum(w.nbytes for w in weights_of(unit))


# --- in the engine ----------------------------------------------------------------------------


def graph(engine: Engine, request: GraphRequest) -> Any:
    return engine.graph(
        request.key,
        TorchBladeBackend(),
        lambda: request,
        checkpoint=lambda: None,
        announce=lambda _: None,
    )


def test_units_of_one_structure_share_a_graph(package: ModuleType) -> None:
    engine = Engine(budget=2**30)
    first, second = request_of(Unit()), request_of(Unit())
    with engine.counters.expect(graphs_compiled=1, cache_misses=1, cache_hits=1):
        graphs = [graph(engine, first), graph(engine, second)]
    assert graphs[0] is graphs[1]
    assert len(package.switches.optimized_with) == 1
    for request in (first, second, first):
        assert_equal_to_eager(graphs[0].call, request)


def test_failure_is_remembered(package: ModuleType) -> None:
    engine = Engine(budget=2**30)
    package.switches.compile_error = RuntimeError("disc_compiler_main returned 1")
    request = request_of()
    with engine.counters.expect(graphs_compiled=0, compile_failures=1):
        for _ in range(2):
            with pytest.raises(CompileFailed, match="built no engine for Unit"):
                graph(engine, request)
    assert len(package.switches.optimized_with) == 1


def test_wrong_result_is_refused(package: ModuleType) -> None:
    package.switches.during_run = lambda x: x * 1.01
    engine = Engine(budget=2**30)
    with (
        engine.counters.expect(graphs_compiled=0, compile_failures=1),
        pytest.raises(
            CompileFailed, match="torch_blade built for Unit differs from the uncompiled"
        ),
    ):
        graph(engine, request_of())


def test_engine_that_fails_at_once_is_refused(package: ModuleType) -> None:
    package.switches.during_run = failing("Fallback haven't been implemented")
    with pytest.raises(CompileFailed) as caught:
        graph(Engine(budget=2**30), request_of())
    assert str(caught.value) == (
        "torch_blade could not compile Unit: RuntimeError: Fallback haven't been implemented"
    )


def test_auto_takes_it_where_it_can_run(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    engine = Engine(budget=2**30)
    assert engine.backends(OptimizeConfig(), CPU)[0].name == "torch_blade"
    forget()
    monkeypatch.setitem(sys.modules, "torch_blade", None)
    chosen = OptimizeConfig(backend="torch_blade", on_failure="error")
    with pytest.raises(BackendUnavailable) as caught:
        engine.backends(chosen, CPU)
    assert str(caught.value) == (
        'Blade cannot use backend "torch_blade" here. torch_blade: torch_blade is not installed.'
    )

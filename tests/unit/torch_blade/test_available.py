"""Whether the torch_blade backend can run, against a stand-in that has the real package's traps."""

from __future__ import annotations

import importlib
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from blade_tests.unit.torch_blade.units import (
    CPU,
    TORCH,
    VERSION,
    Install,
    Plain,
    Unit,
    forget,
    request_of,
)

from blade.blade_core.backends.torch_blade import TorchBladeBackend
from blade.blade_core.errors import BackendUnavailable
from blade.blade_core.graph import Positional

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


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

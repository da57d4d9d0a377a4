"""A build of the stand-in that can be imported."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from blade_tests.unit.torch_blade.units import CPU, STAND_IN, Install, forget

from blade.blade_core.backends.torch_blade import TorchBladeBackend


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


@pytest.fixture
def package(install: Install) -> ModuleType:
    """A stand-in that works, imported by the backend."""
    install()
    assert TorchBladeBackend().available(CPU) is None
    return sys.modules["torch_blade"]

"""A folder for graphs, and what needs a host's name but no host."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
from blade_tests.unit.samples import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "graphs"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture(scope="module")
def weights() -> Any:
    """A copy of host/weights.py over an empty `comfy.ops`; tests/host has the real one."""
    name = "blade.blade_core.host.weights"
    spec = importlib.util.spec_from_file_location(name, ROOT / "blade_core/host/weights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    comfy: Any = ModuleType("comfy")
    comfy.ops = ModuleType("comfy.ops")
    there = {"comfy": comfy, "comfy.ops": comfy.ops, name: module}  # its dataclasses look it up
    with mock.patch.dict(sys.modules, there):
        spec.loader.exec_module(module)
    return module

"""Processes that compile for a GPU take nothing of it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from blade_tests.host.tiny import SD15, make_model, sample

import blade.blade_core
from blade.blade_core.config import OptimizeConfig
from blade.blade_core.host.model import Session, optimize_model
from blade.blade_core.jobs import Jobs

_ALONE = """
import importlib.util, pathlib, sys, torch
folder, *files = sys.argv[1:]
spec = importlib.util.spec_from_file_location(
    "blade_core", folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules["blade_core"] = importlib.util.module_from_spec(spec)
from blade_core.backends import BACKENDS
sizes = [len(BACKENDS["inductor"].compile_job(pathlib.Path(file).read_bytes())) for file in files]
assert torch.cuda.is_initialized() and all(sizes)
print(torch._C._cuda_hasPrimaryContext(0))
"""


def test_compiling_makes_no_context(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLADE_COMPILE_WORKERS", "8")
    files: dict[str, Path] = {}
    add = Jobs.add

    def noted(
        self: Jobs, key: Any, backend: str, payload: bytes, *more: Any, **options: Any
    ) -> None:
        kind = key.label.split()[0]
        files[kind] = tmp_path / kind
        files[kind].write_bytes(payload)
        add(self, key, backend, payload, *more, **options)

    monkeypatch.setattr(Jobs, "add", noted)
    model = make_model(SD15 | {"model_channels": 320, "num_heads": 8}, dtype=torch.float16)
    sample(optimize_model(model, OptimizeConfig(on_failure="error")))

    (folder,) = blade.blade_core.__path__
    wanted = [str(files[kind]) for kind in ("Conv2d", "ResBlock", "SpatialTransformer")]
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, folder, *wanted], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False"]

"""Makes the pack importable as `blade` and the tooling as `devtools`, and marks tests by folder."""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Tests that count what is compiled must not find what earlier ones left on disk.
os.environ["BLADE_DISK_CACHE_MIB"] = "0"

_MARKS = ("unit", "process", "host", "server", "bench", "gpu")


# By path: the folder that holds it must not be on sys.path.
_package = runpy.run_path(str(ROOT / "devtools" / "pack.py"))["register_package"]

# `python -m pytest` puts the checkout on sys.path, where its `nodes` would hide ComfyUI's.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
_package("blade", ROOT)
_package("blade_tests", ROOT / "tests")  # for what several test files share
_package("benchmarks", ROOT / "benchmarks")
_devtools = _package("devtools", ROOT / "devtools")
assert _devtools.__spec__ is not None and _devtools.__spec__.loader is not None
_devtools.__spec__.loader.exec_module(_devtools)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by its folder; skip the GPU's where there is none."""
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        if folder in _MARKS:
            item.add_marker(folder)
    # The longest first, so that where there are several processes nobody waits for it at the end.
    items.sort(key=lambda item: item.get_closest_marker("server") is None)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not _has_cuda():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.hookimpl(optionalhook=True)  # of xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Which tests share a process: a file's share what they set up, others a server or the GPU.

    With `--dist load` none do: for tests that measure no memory, such as those of the kernels,
    which compile for longer than they run.
    """
    from xdist.scheduler import LoadScopeScheduling

    if config.getvalue("dist") == "load":
        return None

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return file if {"server", "gpu"}.isdisjoint(Path(file).parts) else "one by one"

    return ByFile(config, log)


def _has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())

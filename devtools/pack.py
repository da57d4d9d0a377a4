"""Makes the checkout importable as the package `blade`, the way ComfyUI loads a node pack.

The checkout's folder is never put on sys.path: its `nodes` would hide ComfyUI's own `nodes.py`.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def register_package(name: str, folder: Path) -> ModuleType:
    """Register `folder` as the package `name`, without running its `__init__.py`."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    return module

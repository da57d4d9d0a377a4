"""Import hook that lets ComfyUI start where torchvision or torchaudio is not usable.

devtools/environment.py copies this file into the virtual environment, where a .pth file calls
`install` at interpreter start. It must therefore stay self-contained, cheap, and must not import
torch before ComfyUI does: main.py has to set up the process first.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

_OPS = ("nms", "qnms")
_libraries: list[Any] = []  # torch drops the declarations together with the library object


def install() -> None:
    """Register both finders; the stand-in comes last, so any real torchaudio wins."""
    sys.meta_path.insert(0, _TorchvisionFinder())
    sys.meta_path.append(_TorchaudioStandIn())


def _declare_missing_ops(package: Path) -> None:
    """Declare the ops torchvision registers fake kernels for, if its C++ library can't."""
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return
    for suffix in EXTENSION_SUFFIXES:
        file = package / f"_C{suffix}"
        if file.is_file():
            try:
                torch.ops.load_library(str(file))
            except OSError:
                continue
            return
    library = torch.library.Library("torchvision", "DEF")
    for name in _OPS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)


class _TorchvisionFinder:
    """Finds torchvision as usual, but declares its ops just before its first line runs."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.origin is None or spec.loader is None:
            return None
        run = spec.loader.exec_module
        package = Path(spec.origin).parent

        # Not while finding: packages look for torchvision without wanting torch imported.
        def exec_module(module: ModuleType) -> None:
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                _declare_missing_ops(package)
            run(module)

        setattr(spec.loader, "exec_module", exec_module)  # noqa: B010  (a method, for mypy)
        return spec


class _TorchaudioStandIn(Loader):
    """An empty torchaudio: hosts import it at start, image workflows never call it."""

    _NAMES = ("torchaudio", "torchaudio.functional", "torchaudio.transforms")

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self._NAMES:
            return None
        return ModuleSpec(name, self, is_package=name == "torchaudio")

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "torchaudio.transforms":
            module.MelScale = type("MelScale", (), {})  # type: ignore[attr-defined]
        elif module.__name__ == "torchaudio":
            import_module("torchaudio.functional")
            import_module("torchaudio.transforms")

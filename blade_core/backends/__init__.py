"""The compilers, one a file, behind one protocol."""

from __future__ import annotations

from .base import Backend
from .eager import EagerBackend
from .inductor import InductorBackend
from .torch_blade import TorchBladeBackend

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (TorchBladeBackend(), InductorBackend(), EagerBackend())
}

__all__ = ["BACKENDS", "Backend"]

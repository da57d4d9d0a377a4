"""Stands in for torch_blade, which no torch of today can import.

Written from what the real package (0.2.0) was seen to do, its traps included: it optimises
nothing, but fails, keeps silent and returns as the real one does. The tests import a copy, with
a `disc_compiler_main` in it, and change what the copy's build was like.
"""

import warnings

from . import build, config, mlir, optimization, switches, version
from .config import Config
from .optimization import optimize

warnings.filterwarnings("ignore")  # the real package does this too

__all__ = [
    "Config",
    "build",
    "config",
    "mlir",
    "optimization",
    "optimize",
    "switches",
    "version",
]

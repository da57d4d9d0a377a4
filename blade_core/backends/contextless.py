"""Compiling for a GPU without a context on it, which takes half a gigabyte and most of a second.

Inductor makes one for the first fake tensor, and to load the kernels that it has compiled. A
process that only compiles runs none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_context() -> Iterator[None]:
    """Make no context of a GPU that the graphs compiled meanwhile do not need.

    Reductions in several rounds do: by the registers that one takes once it is loaded, Inductor
    decides whether to compile it with smaller blocks, too.
    """
    from torch._inductor.runtime.hints import HeuristicType
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._subclasses import fake_tensor

    autotuner: Any = CachingAutotuner
    load = autotuner._make_launchers

    def load_reduction(kernel: Any) -> None:
        if kernel.heuristic_type == HeuristicType.REDUCTION:
            load(kernel)

    with (
        _replaced(fake_tensor, "init_gpu_context", _no_context),
        _replaced(autotuner, "_make_launchers", load_reduction),
    ):
        yield


def _no_context(device: torch.device) -> None:
    pass


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)

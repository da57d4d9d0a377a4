"""Launching Triton kernels out of operators that compilers look into."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


class Traced:
    """`kernel` as tracing wants it, `traced[grid](...)`, for `run(..., wrap=Traced)`.

    Torch makes a new kernel out of each launch that says how many warps it takes, and never
    forgets one: it looks through all of them again with each graph that it compiles. So here the
    number is part of the kernel, and each is made once.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, num_stages: int = 3, **kwargs: Any) -> None:
            from torch.library import wrap_triton

            wrap_triton(_configured(self._kernel, num_warps, num_stages))[grid](*args, **kwargs)

        return launch


@cache
def _configured(kernel: Any, num_warps: int, num_stages: int) -> Any:
    import triton

    config = triton.Config({}, num_warps=num_warps, num_stages=num_stages)
    return triton.autotune([config], key=[])(kernel)

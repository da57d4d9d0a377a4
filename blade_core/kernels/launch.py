"""Operators that compilers look into, and launching Triton kernels out of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def registered(function: Callable[..., Any], version: int) -> Any:
    """`function`, which launches a kernel on CUDA and gives its eager twin's result elsewhere, as
    an operator `blade::NAME_VERSION` of torch.

    Inductor sees the kernel in it, so that it is launched and stored as its own are. The version
    is part of the name: compilers know a graph that they keep by its operators. Call it where the
    operator is first needed: torch looks for Triton then.
    """
    from torch.library import triton_op

    name = f"{function.__name__}_{version}"
    triton_op(f"blade::{name}", mutates_args=())(function)
    return getattr(torch.ops.blade, name).default


@cache
def opaque(
    function: Callable[..., Any], form: Callable[..., Any], schema: str, version: int
) -> Any:
    """`function` as an operator `blade::NAME_VERSION` of torch that compilers call as it is.

    form: gives a tensor like the result, from arguments without data.
    """
    name = f"{function.__name__}_{version}"
    torch.library.define(f"blade::{name}", schema)
    torch.library.impl(f"blade::{name}", "default", function)
    torch.library.register_fake(f"blade::{name}", form)
    return getattr(torch.ops.blade, name).default


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

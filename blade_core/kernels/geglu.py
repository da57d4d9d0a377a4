"""A linear layer whose one half gates the other, as one kernel: no pass over both halves.

The product alone is faster in cuBLAS. What pays is that the two halves, twice as wide as the
result, are never written, and that cuBLAS clears memory before some of its products, for which a
CUDA graph stands still.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from .device import is_hopper
from .launch import Traced, registered

VERSION = 2
"""Counts changes of the kernel. Compiled graphs that are kept are of one version."""

_ROWS, _COLUMNS, _DEPTH = 128, 128, 64
"""Of the result that a program computes, and of what it multiplies at once."""

_LEAST_ROWS = 1024
"""Below, an H100 is not full of programs, and cuBLAS is faster."""


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The eager twin, by torch's own operations.

    Args:
        x: (M, K).
        weight: (2N, K); bias: (2N,). The second half's rows are the gate's.

    Returns:
        (M, N): the first half times gelu(the second).

    Source: https://arxiv.org/abs/2002.05202 (GEGLU).
    """
    values, gate = functional.linear(x, weight, bias).chunk(2, -1)
    return values * functional.gelu(gate)


def usable(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> bool:
    """Whether the kernel can take the place of the eager twin, and is faster."""
    return (
        is_hopper(x)
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.ndim == weight.ndim == 2
        and x.shape[1] == weight.shape[1]
        and bias.shape == weight.shape[:1]
        and weight.shape[0] % (2 * _COLUMNS) == x.shape[1] % _DEPTH == 0
        and x.shape[0] >= _LEAST_ROWS
        and all(t.is_contiguous() and t.dtype == x.dtype for t in (x, weight, bias))
        and all(t.storage_offset() % 8 == 0 for t in (x, weight, bias))  # 16 bytes
        and max(x.numel(), weight.numel(), x.shape[0] * weight.shape[0]) < 2**31
    )


def run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> torch.Tensor:
    """The same by the kernel, for `usable` tensors. `wrap` is given it before it is launched."""
    from .geglu_triton import geglu

    rows, depth = x.shape
    columns = weight.shape[0] // 2
    out = x.new_empty((rows, columns))
    wrap(geglu)[(-(-rows // _ROWS) * (columns // _COLUMNS),)](
        x,
        weight,
        bias,
        out,
        depth,
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=depth,
        BLOCK_R=_ROWS,
        BLOCK_C=_COLUMNS,
        BLOCK_D=_DEPTH,
        TOGETHER=8,
        num_warps=8,
        num_stages=3,
    )
    return out


def geglu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The kernel on CUDA, the twin elsewhere."""
    return run(x, weight, bias, Traced) if x.is_cuda else reference(x, weight, bias)


def operator() -> Any:
    """`geglu` as an operator of torch."""
    return registered(geglu, VERSION)

"""A linear layer whose one half gates the other, as one kernel: no pass over both halves.

The product is as fast as cuBLAS's alone. What pays is that the two halves, twice as wide as the
result, are never written, and that cuBLAS clears memory before some of its products, for which a
CUDA graph stands still.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from .device import is_hopper, processors
from .launch import Traced, registered

VERSION = 3
"""Counts changes of the kernel. Compiled graphs that are kept are of one version."""


class Tile(NamedTuple):
    """What a program computes of the result at once, and how many programs share a processor."""

    rows: int
    columns: int
    warps: int
    beside: int


_DEPTH = 64
"""What is multiplied at once. As large as shared memory allows for three of them."""

_LARGE = Tile(128, 128, warps=8, beside=1)
_SMALL = Tile(128, 64, warps=4, beside=2)
"""One of the two computes gelu while the other multiplies."""

_LEAST_ROWS = 512
"""Below, an H100 is not full of programs, and cuBLAS is faster."""


def tile(rows: int, depth: int) -> Tile:
    """The faster one for x of (rows, depth) on an H100 (docs/log.md): large tiles read less, which
    counts where there is much to read."""
    return _LARGE if rows >= 2048 and depth >= 1024 else _SMALL


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
        and weight.shape[0] % (2 * _LARGE.columns) == x.shape[1] % _DEPTH == 0
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
    part = tile(rows, depth)
    tiles = -(-rows // part.rows) * (columns // part.columns)
    wrap(geglu)[(min(tiles, processors(x.device) * part.beside),)](
        x,
        weight,
        bias,
        out,
        depth,
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=depth,
        BLOCK_R=part.rows,
        BLOCK_C=part.columns,
        BLOCK_D=_DEPTH,
        TOGETHER=8,
        num_warps=part.warps,
        num_stages=3,
    )
    return out


def geglu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The kernel on CUDA, the twin elsewhere."""
    return run(x, weight, bias, Traced) if x.is_cuda else reference(x, weight, bias)


def operator() -> Any:
    """`geglu` as an operator of torch."""
    return registered(geglu, VERSION)

"""LayerNorm with the sum before it, in one pass.

Compilers keep a row on the chip up to 1024 values, and read wider ones three times. For narrow
ones it is the bias that comes along which pays (see token_passes.pays_late).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from .launch import Traced, registered

VERSION = 1
"""Counts changes of the kernel. Compiled graphs that are kept are of one version."""

_NARROW, _WIDE, _MOST_WIDTH = 512, 1025, 4096
"""Up to the first a bias pays, from the second on the kernel itself."""


def reference(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    term: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The eager twin, by torch's own operations: x + shift + term, and its layer_norm.

    Args:
        x: (..., C), contiguous.
        shift: (C,), the bias of the linear layer that gave x, or None.
        term: as x, or None.
        weight, bias: (C,).
    """
    if shift is not None:
        x = x + shift
    if term is not None:
        x = x + term
    if shift is None and term is None:
        x = x.clone()
    return x, functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def usable(x: torch.Tensor, shift: bool) -> bool:
    """Whether the kernel can take the place of the eager twin, and is faster."""
    width = x.shape[-1]
    return (
        x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.ndim > 1
        and x.is_contiguous()
        and (_WIDE <= width <= _MOST_WIDTH or (shift and 0 < width <= _NARROW))
        and width % 8 == x.storage_offset() % 8 == 0  # 16 bytes
        and 0 < x.numel() < 2**31  # the kernel counts in 32 bits
    )


def run(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    term: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the kernel, for a `usable` x. `wrap` is given it before it is launched.

    Where nothing is added, the sum is not written: it is x.
    """
    from .layer_norm_triton import layer_norm

    width = x.shape[-1]
    block = 1 << (width - 1).bit_length()
    out = x.new_empty(x.shape)  # not empty_like, which Inductor fills
    adds = shift is not None or term is not None
    total = x.new_empty(x.shape) if adds else x.new_empty(0)
    wrap(layer_norm)[(x.numel() // width,)](
        x,
        bias if shift is None else shift,
        x if term is None else term,
        weight,
        bias,
        total if adds else out,
        out,
        EPS=eps,
        WIDTH=width,
        SHIFT=shift is not None,
        TERM=term is not None,
        BLOCK=block,
        num_warps=max(2, block // 1024),
    )
    return total, out


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """The norm alone, by the kernel on CUDA, the twin elsewhere."""
    return add_layer_norm(x, None, None, weight, bias, eps)[1]


def add_layer_norm(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    term: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum and its norm, by the kernel on CUDA, the twin elsewhere."""
    arguments = (x, shift, term, weight, bias, eps)
    return run(*arguments, Traced) if x.is_cuda else reference(*arguments)


def operators() -> tuple[Any, Any]:
    """`layer_norm` and `add_layer_norm` as operators of torch."""
    return registered(layer_norm, VERSION), registered(add_layer_norm, VERSION)

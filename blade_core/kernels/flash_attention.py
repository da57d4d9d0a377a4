"""Attention over some hundred keys, block by block.

cuDNN's attention is faster over thousands. Here it costs more than its arithmetic: in a CUDA
graph each of its calls brings a memset, after which the GPU stands still for microseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .device import is_hopper
from .launch import Traced, registered
from .short_attention import parts, places, readable, reference

VERSION = 1
"""Counts changes of the kernel. Compiled graphs that are kept are of one version."""

_ROWS, _KEYS = 64, 64
"""Of a program, and of what it takes up at once. Chosen from measurements on an H100."""

_LEAST_KEYS = 81
_MOST_WIDTH = 160
_MOST_WORK = 16e9
"""Floating-point operations, from which on cuDNN is as fast even so: two images of SDXL."""

__all__ = ["VERSION", "operator", "reference", "run", "usable"]


def usable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the kernel can take the place of `reference`, the eager twin, and is faster."""
    return (
        is_hopper(q)
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.ndim == 4
        and k.shape == v.shape == (*q.shape[:2], k.shape[2], q.shape[3])
        and k.shape[2] >= _LEAST_KEYS
        and 40 <= q.shape[3] <= _MOST_WIDTH
        and 4 * q.numel() * k.shape[2] <= _MOST_WORK
        and all(t.dtype == q.dtype and readable(t) for t in (q, k, v))
    )


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> torch.Tensor:
    """The same by the kernel, for `usable` tensors. `wrap` is given it before it is launched."""
    from .flash_attention_triton import attend_blocks

    images, heads, rows, width = q.shape
    out = q.new_empty((images, rows, heads, width))
    width_1, width_2 = parts(width)
    wrap(attend_blocks)[(-(-rows // _ROWS), heads, images)](
        q,
        k,
        v,
        out,
        **places(q, k, v, scale),
        BLOCK_R=_ROWS,
        BLOCK_K=_KEYS,
        WIDTH_1=width_1,
        WIDTH_2=width_2,
        num_warps=4,
        num_stages=3 if width <= 80 else 2,
    )
    return out.transpose(1, 2)


def flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """The kernel on CUDA, the twin elsewhere."""
    return run(q, k, v, scale, Traced) if q.is_cuda else reference(q, k, v, scale)


def operator() -> Any:
    """`flash_attention` as an operator of torch."""
    return registered(flash_attention, VERSION)

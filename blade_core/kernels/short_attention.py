"""Attention over few keys, such as a prompt's: all keys and values of a head on the chip at once.

cuDNN's attention is made for long sequences, and in a CUDA graph each of its calls brings a
memset that costs more than the attention over a prompt does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from .launch import Traced, registered

VERSION = 2
"""Counts changes of the kernel. Compiled graphs that are kept are of one version."""

_MOST_KEYS = 80
_MOST_WIDTH = 160
_MOST_ROWS, _MOST_ROWS_OF_64 = 2**16, 2**18
"""Of all heads and images together. Beyond these, cuDNN was as fast on an H200; where heads are
64 wide, on an H100, it was not."""


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The eager twin, by torch's own attention.

    Args:
        q: (B, heads, L, D); k and v: (B, heads, S, D).

    Returns:
        (B, heads, L, D), a view of memory that lies as (B, L, heads, D).
    """
    out = functional.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def usable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the kernel can take the place of the eager twin, and is faster."""
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.ndim == 4
        and k.shape == v.shape == (*q.shape[:2], k.shape[2], q.shape[3])
        and 0 < k.shape[2] <= _MOST_KEYS
        and 16 <= q.shape[3] <= _MOST_WIDTH
        and q.shape[:3].numel() <= (_MOST_ROWS_OF_64 if q.shape[3] == 64 else _MOST_ROWS)
        and all(t.dtype == q.dtype and readable(t) for t in (q, k, v))
    )


def readable(x: torch.Tensor) -> bool:
    """Whether rows can be read 16 bytes at a time, and places counted in 32 bits."""
    apart = (*x.stride()[:3], x.storage_offset(), x.shape[3])
    span = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.stride(3) == 1 and all(n % 8 == 0 for n in apart) and 0 <= span < 2**31


def places(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> dict[str, Any]:
    """Sizes and strides as an attention kernel's constants."""
    sizes = {"ROWS": q.shape[2], "KEYS": k.shape[2], "WIDTH": q.shape[3]}
    for name, tensor in (("Q", q), ("K", k), ("V", v)):
        for axis, of in enumerate(("IMAGE", "HEAD", "ROW")):
            sizes[f"{name}_{of}"] = tensor.stride(axis)
    return {"FACTOR": scale * math.log2(math.e), **sizes}


def parts(number: int) -> tuple[int, int]:
    """Two blocks, powers of 2 from 16 on or none, that cover `number` with little left over."""
    first = max(16, 1 << (number.bit_length() - 1))
    if first >= number:
        return first, 0
    second = max(16, 1 << (number - first - 1).bit_length())
    return (2 * first, 0) if second == first else (first, second)


class Tile(NamedTuple):
    """Rows of a program, its warps, and the blocks that keys and a head are cut into."""

    rows: int
    warps: int
    keys: tuple[int, int]
    width: tuple[int, int]


def tile(rows: int, keys: int, width: int) -> Tile:
    """Chosen from measurements on an H200 and an H100.

    64 rows or more for 4 warps would be multiplied by other instructions (wgmma), for which
    Triton 3.6 makes code that reads wrong memory if blocks are small: only where none is.
    """
    if width == 64 < keys <= 128:
        return Tile(128, 4, (128, 0), (64, 0))
    block, warps = (64, 2) if width <= 80 else (32, 4) if rows >= 256 else (16, 4)
    return Tile(block, warps, parts(keys), parts(width))


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> torch.Tensor:
    """The same by the kernel, for `usable` tensors. `wrap` is given it before it is launched."""
    from .short_attention_triton import attend

    images, heads, rows, width = q.shape
    keys = k.shape[2]
    block, warps, (keys_1, keys_2), (width_1, width_2) = tile(rows, keys, width)
    out = q.new_empty((images, rows, heads, width))
    wrap(attend)[(-(-rows // block), heads, images)](
        q,
        k,
        v,
        out,
        **places(q, k, v, scale),
        BLOCK_R=block,
        KEYS_1=keys_1,
        KEYS_2=keys_2,
        WIDTH_1=width_1,
        WIDTH_2=width_2,
        num_warps=warps,
    )
    return out.transpose(1, 2)


def short_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """The kernel on CUDA, the twin elsewhere."""
    return run(q, k, v, scale, Traced) if q.is_cuda else reference(q, k, v, scale)


def operator() -> Any:
    """`short_attention` as an operator of torch."""
    return registered(short_attention, VERSION)

"""GroupNorm of channels-last images, with what stands around it in a ResBlock, in few passes.

Compilers take one program for the statistics of each group, which are too few for a large GPU.
Here each takes a part of the rows, and what a second kernel needs of that is merged there, or by
a third between them if there are many parts. A convolution's bias, the timestep embedding and
SiLU come along without another pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from .launch import Traced, registered

VERSION = 3
"""Counts changes of the kernels. Compiled graphs that are kept are of one version."""

_MOST_CHUNKS = 64
"""Chunks that each program of the second kernel merges by itself; a VAE's images have thousands."""

_CHUNKS = ((256, 64), (1024, 128), (4096, 256), (8192, 512), (2**15, 128), (2**31, 512))
"""Rows of an image up to which a program of the first kernel takes so many."""

_MOST_WIDTH = 256
"""Channels of a group that a program keeps in registers."""


def reference(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    term: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> torch.Tensor:
    """The eager twin, by torch's own operations: silu(group_norm(x + shift + term)).

    Args:
        x: (N, C, H, W), channels-last.
        shift: (C,), a convolution's bias, or None.
        term: (N, C), the timestep embedding's, or None.
        weight, bias: (C,).
    """
    if shift is not None:
        x = x + shift[:, None, None]
    if term is not None:
        x = x + term[:, :, None, None]
    x = functional.group_norm(x, groups, weight, bias, eps)
    x = functional.silu(x) if silu else x
    return x.contiguous(memory_format=torch.channels_last)


def usable(x: torch.Tensor, groups: int) -> bool:
    """Whether the kernels can take the place of the eager twin for images like `x`."""
    return (
        x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.ndim == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.shape[1] % groups == x.shape[1] % 8 == x.storage_offset() % 8 == 0  # 16 bytes
        and x.shape[1] // groups <= _MOST_WIDTH
        and 0 < x.numel() < 2**31  # the kernels count in 32 bits
    )


@dataclass(frozen=True)
class Tiles:
    """How two kernels share an image.

    chunk: rows of a program of the first kernel; step: how many at once; groups: its groups.
    rows, channels: of a program of the second kernel.
    """

    chunk: int
    step: int
    groups: int
    rows: int
    channels: int


def tiles(rows: int, width: int) -> Tiles:
    """Chosen from measurements on an H200 and an H100. Many chunks are read again by the second
    kernel; beyond `_MOST_CHUNKS` the third spares it that, and small ones fill the GPU again."""
    chunk = next(size for most, size in _CHUNKS if rows <= most)
    return Tiles(
        chunk=chunk,
        step=32,
        groups=max(1, 128 // _power_of_2(width)),
        rows=32 if rows <= 1024 else 64,
        channels=64,
    )


def whole_warps(rows: int, width: int) -> int:
    """Warps of a program that does a group of an image at once; 0 where two kernels are faster."""
    size = _power_of_2(rows) * _power_of_2(width)
    return 0 if size > 2**14 else 8 if size > 2**11 else 4


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def run(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    term: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> torch.Tensor:
    """The same by the kernels, for a `usable` x. `wrap` is given each before it is launched."""
    from .group_norm_triton import apply, merge, statistics, whole

    images, channels, height, wide = x.shape
    rows, width = height * wide, channels // groups
    # Not empty_like, which Inductor fills.
    out = x.new_empty((images, height, wide, channels)).permute(0, 3, 1, 2)
    added = (bias if shift is None else shift, bias if term is None else term.contiguous())
    shape = {"ROWS": rows, "CHANNELS": channels, "WIDTH": width}
    shape |= {"SHIFT": shift is not None, "TERM": term is not None}
    warps = whole_warps(rows, width)
    if warps:
        wrap(whole)[(groups, images)](
            x,
            *added,
            weight,
            bias,
            out,
            EPS=eps,
            **shape,
            SILU=silu,
            BLOCK_R=_power_of_2(rows),
            BLOCK_W=_power_of_2(width),
            num_warps=warps,
        )
        return out
    tile = tiles(rows, width)
    chunks = -(-rows // tile.chunk)
    partial = x.new_empty((2, images, groups, chunks), dtype=torch.float32)
    shape |= {"CHUNKS": chunks, "CHUNK_ROWS": tile.chunk}
    wrap(statistics)[(chunks, -(-groups // tile.groups), images)](
        x,
        *added,
        partial,
        **shape,
        BLOCK_R=tile.step,
        BLOCK_G=tile.groups,
        BLOCK_W=_power_of_2(width),
        num_warps=4,
    )
    if chunks > _MOST_CHUNKS:
        parts, size = partial, {key: shape[key] for key in ("ROWS", "WIDTH")}
        partial = x.new_empty((2, images, groups, 1), dtype=torch.float32)
        wrap(merge)[(groups, images)](
            parts,
            partial,
            **size,
            CHUNKS=chunks,
            CHUNK_ROWS=tile.chunk,
            BLOCK_K=min(_power_of_2(chunks), 1024),
            num_warps=4,
        )
        chunks, shape = 1, shape | {"CHUNKS": 1, "CHUNK_ROWS": rows}
    wrap(apply)[(-(-rows // tile.rows), -(-channels // tile.channels), images)](
        x,
        *added,
        weight,
        bias,
        partial,
        out,
        EPS=eps,
        **shape,
        SILU=silu,
        BLOCK_K=max(2, _power_of_2(chunks)),
        BLOCK_R=tile.rows,
        BLOCK_C=tile.channels,
        num_warps=4,
    )
    return out


def group_norm(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    term: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> torch.Tensor:
    """The kernels on CUDA, the twin elsewhere."""
    arguments = (x, shift, term, weight, bias, groups, eps, silu)
    return run(*arguments, Traced) if x.is_cuda else reference(*arguments)


def operator() -> Any:
    """`group_norm` as an operator of torch."""
    return registered(group_norm, VERSION)

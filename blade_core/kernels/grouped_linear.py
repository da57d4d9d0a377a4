"""Many small linear layers over one input as one kernel, skipped while the input stays the same.

A UNet projects the prompt to keys and values in every cross-attention (140 products a step in
SDXL) and the timestep embedding in every ResBlock. Weights stay where they are: the kernel is
given their addresses. Whether the input has changed is found out on the GPU, so that nothing is
ever stale and nobody waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional

Linear = tuple[torch.Tensor, torch.Tensor | None]
"""Weight (N, K) and bias (N,) of one layer."""


def reference(x: torch.Tensor, layers: Sequence[Linear], *, silu: bool) -> list[torch.Tensor]:
    """The eager twin: what GroupedLinear gives, by torch's own operations."""
    if silu:
        x = functional.silu(x)
    return [functional.linear(x, weight, bias) for weight, bias in layers]


def usable(x: torch.Tensor, layers: Sequence[Linear]) -> bool:
    """Whether the kernel can take the place of the eager twin."""
    tensors = [t for layer in layers for t in layer if t is not None]
    return (
        x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and all(t.dtype == x.dtype and t.device == x.device for t in tensors)
        and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)
        and x.shape[-1] % 16 == 0
        and _kernels() is not None
    )


class GroupedLinear:
    """The layers over inputs of one shape, with the memory of their last results.

    Args:
        like: an input, (..., K), contiguous, fp16 or bf16 on CUDA.
        layers: their weights must stay where they are, and this object must not outlive them.
        silu: the input goes through SiLU first, rounded as eager does.
        skip_unchanged: results are kept while the input's values do not change.
    """

    def __init__(
        self, like: torch.Tensor, layers: Sequence[Linear], *, silu: bool, skip_unchanged: bool
    ) -> None:
        self._silu, self._skip = silu, skip_unchanged
        width = like.shape[-1]
        self._rows = like.numel() // width
        self._tile = (16, 32, 128) if self._rows <= 16 else (64, 64, 64)
        columns = [weight.shape[0] for weight, _ in layers]
        # Written in inference mode and out of it.
        with torch.inference_mode(False):
            # Never equal to any input at first, so that the first call computes.
            self._x = torch.full_like(like, float("nan"))
            self._changed = torch.ones(1, dtype=torch.int32, device=like.device)
            self._flat = like.new_empty(self._rows * sum(columns))
            self._table = torch.tensor(_tiles(layers, self._rows, self._tile[1]), dtype=torch.int64)
            self._table = self._table.to(like.device)
        parts = self._flat.split([self._rows * n for n in columns])
        self.outputs = [
            part.view(*like.shape[:-1], n) for part, n in zip(parts, columns, strict=True)
        ]

    def adjacent(self, first: torch.Tensor, count: int) -> torch.Tensor:
        """`count` outputs of one shape from `first` on, as torch.cat gives them."""
        shape = (count * first.shape[0], *first.shape[1:])
        return self._flat.as_strided(shape, first.stride(), first.storage_offset())

    def forget(self) -> None:
        """The weights may have changed: compute at the next call, whatever its input."""
        self._x.fill_(float("nan"))

    def __call__(self, x: torch.Tensor) -> None:
        """Bring `outputs` up to date with `x`."""
        kernels = _kernels()
        assert kernels is not None
        if self._skip:
            self._changed.zero_()
            count = x.numel()
            kernels.compare[(-(-count // 2048),)](x, self._x, self._changed, count, BLOCK=2048)
        else:
            # `x` may be memory that a recording has only reserved, which Triton cannot be given.
            self._x.copy_(x)
        block_m, block_n, block_k = self._tile
        grid = (self._table.shape[0], -(-self._rows // block_m))
        kernels.grouped_linear[grid](
            self._x,
            self._table,
            self._changed,
            self._flat,
            self._rows,
            K=x.shape[-1],
            SILU=self._silu,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=4,
        )


def _tiles(layers: Sequence[Linear], rows: int, block: int) -> list[list[int]]:
    """(weight address, bias address or 0, first element of the output, N, first column)."""
    tiles, offset = [], 0
    for weight, bias in layers:
        n = weight.shape[0]
        address = 0 if bias is None else bias.data_ptr()
        tiles += [[weight.data_ptr(), address, offset, n, start] for start in range(0, n, block)]
        offset += rows * n
    return tiles


@lru_cache
def _kernels() -> Any:
    """The Triton kernels, or None where there is no Triton."""
    try:
        from . import grouped_linear_triton
    except ImportError:
        return None
    return grouped_linear_triton

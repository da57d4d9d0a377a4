"""Host memory for many tensors that travel to a GPU together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_BLOCK = 2**25
"""Bytes. Torch rounds pinned memory up to a power of two, so that full blocks waste nothing."""
_ALIGNMENT = 64


def pack(tensors: Sequence[torch.Tensor], *, pinned: bool) -> tuple[list[torch.Tensor], bool]:
    """Copy CPU tensors into few blocks, each dtype's in order, one behind the other.

    Returns the copies, and whether it is sure that none holds NaN or infinity: sums over whole
    blocks tell, which may overflow without. A block lives as long as any copy in it.
    pinned: in page-locked memory, if there is any left.
    """
    copies: dict[int, torch.Tensor] = {}
    finite = True
    for dtype in {tensor.dtype for tensor in tensors}:
        mine = [number for number, tensor in enumerate(tensors) if tensor.dtype == dtype]
        for numbers in _blocks([tensors[n] for n in mine], mine):
            sizes = [_aligned(tensors[n]) for n in numbers]
            block = _empty(sum(sizes), dtype, pinned).zero_()  # what lies between is summed, too
            start = 0
            for n, size in zip(numbers, sizes, strict=True):
                place = block[start : start + tensors[n].numel()]
                copies[n] = place.view(tensors[n].shape).copy_(tensors[n])
                start += size
            if dtype.is_floating_point or dtype.is_complex:
                finite &= bool(block.sum(dtype=_wide(dtype)).isfinite())
    return [copies[number] for number in range(len(tensors))], finite


def _blocks(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> list[list[int]]:
    """`numbers` of tensors that fill a block each."""
    blocks: list[list[int]] = []
    used = _BLOCK
    for number, tensor in zip(numbers, tensors, strict=True):
        size = _aligned(tensor) * tensor.element_size()
        if used + size > _BLOCK:
            blocks.append([])
            used = 0
        blocks[-1].append(number)
        used += size
    return blocks


def _aligned(tensor: torch.Tensor) -> int:
    """Elements that a tensor takes in a block."""
    step = max(1, _ALIGNMENT // tensor.element_size())
    return -(-tensor.numel() // step) * step


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex64 if dtype.is_complex else torch.float32


def _empty(count: int, dtype: torch.dtype, pinned: bool) -> torch.Tensor:
    with torch.inference_mode(False):  # or no one could write it outside of that mode
        if pinned:
            try:
                return torch.empty(count, dtype=dtype, pin_memory=True)
            except RuntimeError:  # the system locks no more pages
                pass
        return torch.empty(count, dtype=dtype)
